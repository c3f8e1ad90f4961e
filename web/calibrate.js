/** Calibrating with the settings of the workflow at hand: what is queued for it, and how long it still takes. Pure. */

const LEAST_PROMPTS = 100
const ENOUGH = 5 // prompts measured, to say how long the others take
const EXPLAIN = 'DejaVuExplain'
const MONITOR = 'DejaVuMonitor'
const LINK_CLIP = 'No text encoder was found for ordinary prompts: link CLIP to the Monitor’s clip input, then press the button again.'

/** How many ordinary prompts a verdict at this alpha takes, in hundreds. */
export function promptsFor(alpha) {
  const needed = alpha > 0 ? Math.ceil(1 / alpha - 1e-9) - 1 : 0
  return Math.max(LEAST_PROMPTS, 100 * Math.ceil(needed / 100))
}

/**
 * The prompt as the host's queue takes it ({node id: {class_type, inputs}}) with ``count`` ordinary prompts to be measured
 * first by the Monitor ``id``, or by the one that the Verdict ``id`` reads: {output}, or {why} with the one thing to do.
 *
 * A Monitor whose clip is open gets the text encoder of the sampler's own prompt. ``output`` itself stays as it is.
 */
export function withCalibration(output, id, count = LEAST_PROMPTS) {
  const monitorId = output[id]?.class_type === MONITOR ? id : source(output[id]?.inputs?.monitor)
  const monitor = output[monitorId]
  if (!output[id]) return { why: 'This node is muted or bypassed, or its workflow is not open: switch it on, then press the button again.' }
  if (output[id].class_type === EXPLAIN) return { why: 'Explain measures before sampling: put a Monitor and a Verdict into the workflow to calibrate in a run, or link Calibrate.' }
  if (monitor?.class_type !== MONITOR) return { why: 'No Monitor was found: link the Monitor’s monitor output to this node, then press the button again.' }
  const clip = monitor.inputs.clip ?? textEncoder(output, monitorId)
  if (!clip) return { why: LINK_CLIP }
  return { output: { ...output, [monitorId]: { ...monitor, inputs: { ...monitor.inputs, clip, calibrate_first: count } } } }
}

/** The link to the text encoder with which the prompt of the sampler behind a Monitor was encoded; null without one. */
function textEncoder(output, monitorId) {
  for (const node of watched(output, monitorId)) {
    const clip = clipOf(output, Object.entries(node.inputs).filter(([name]) => isPositive(name)).map(([, link]) => link))
    if (clip) return clip
  }
  return null
}

/** The nodes that take the Monitor's model, nearest first: patches, guiders and samplers. */
function watched(output, monitorId) {
  const found = new Set([monitorId])
  for (const id of found) {
    for (const [other, node] of Object.entries(output)) {
      const takes = Object.entries(node.inputs ?? {}).some(([name, link]) => /^(model|guider)/.test(name) && source(link) === id && (id !== monitorId || link[1] === 0))
      if (takes) found.add(other)
    }
  }
  return [...found].slice(1).map((id) => output[id])
}

/** The first clip that is linked to a node from which these conditionings come. */
function clipOf(output, links) {
  const seen = new Set(links.map(source))
  for (const id of seen) {
    const inputs = output[id]?.inputs ?? {}
    const clip = Object.entries(inputs).find(([name, link]) => /^clip$/i.test(name) && source(link) !== null)
    if (clip) return clip[1]
    for (const [name, link] of Object.entries(inputs)) if (isPositive(name) && source(link) !== null) seen.add(source(link))
  }
  return null
}

const isPositive = (name) => /^(positive|cond)/.test(name)
const source = (link) => (Array.isArray(link) && link.length === 2 && typeof link[1] === 'number' ? String(link[0]) : null)

/**
 * 'About 2 minutes left', by how long the prompts since ``since`` {at, done} took; '' while that is not known.
 * Times in milliseconds.
 */
export function timeLeft(since, now, { done, count }) {
  const measured = done - since.done
  if (measured < ENOUGH) return ''
  const seconds = ((now - since.at) / measured) * (count - done) / 1000
  if (seconds < 10) return 'A few seconds left'
  if (seconds < 55) return 'Less than a minute left'
  const minutes = Math.round(seconds / 60)
  if (minutes < 60) return minutes <= 1 ? 'About a minute left' : `About ${minutes} minutes left`
  const hours = Math.round(minutes / 60)
  return hours === 1 ? 'About an hour left' : `About ${hours} hours left`
}
