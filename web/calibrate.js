/** Calibrating with the settings of the workflow at hand: what is queued for it, and how long it still takes. Pure. */

const LEAST_PROMPTS = 100, MOST_PROMPTS = 100_000 // the node takes no more
const ENOUGH = 5 // prompts measured, to say how long the others take
const EXPLAIN = 'DejaVuExplain'
const MONITOR = 'DejaVuMonitor'

/** How many ordinary prompts a verdict at this alpha takes, in hundreds. */
export function promptsFor(alpha) {
  const needed = alpha > 0 ? Math.ceil(1 / alpha - 1e-9) - 1 : 0
  return Math.min(MOST_PROMPTS, Math.max(LEAST_PROMPTS, 100 * Math.ceil(needed / 100)))
}

/**
 * The prompt as the host's queue takes it ({node id: {class_type, inputs}}) with ``count`` ordinary prompts to be measured
 * first by the Monitor ``id``, or by the one that the Verdict ``id`` reads: {output}, or {why} with the one thing to do.
 *
 * The server links a Monitor whose clip is open to the text encoder of the sampler's own prompt. ``output`` stays as it is.
 */
export function withCalibration(output, id, count = LEAST_PROMPTS) {
  const monitorId = output[id]?.class_type === MONITOR ? id : source(output[id]?.inputs?.monitor)
  const monitor = output[monitorId]
  if (!output[id]) return { why: 'This node is muted or bypassed, or its workflow is not open: switch it on, then press the button again.' }
  if (output[id].class_type === EXPLAIN) return { why: 'Explain measures before sampling: put a Monitor and a Verdict into the workflow to calibrate in a run, or link Calibrate.' }
  if (monitor?.class_type !== MONITOR) return { why: 'No Monitor was found: link the Monitor’s monitor output to this node, then press the button again.' }
  return { output: { ...output, [monitorId]: { ...monitor, inputs: { ...monitor.inputs, calibrate_first: count } } } }
}

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
