/**
 * The host's graph: finding nodes by execution id, following links, and changing a text as one undoable step.
 *
 * A place is {node, graph, parents}: the node, the graph that holds it, and the subgraph nodes around it as places.
 */

// Numbers in older front ends, strings in newer ones, as all ids of nodes.
const SUBGRAPH_INPUTS = '-10'
const SUBGRAPH_OUTPUTS = '-20'
const TEXT_NAMES = ['text', 'prompt', 'string', 'value']
const FARTHEST = 100

export const rootGraph = (app) => app.rootGraph ?? app.graph?.rootGraph ?? app.graph

/** Every node of the graph and of the subgraphs in it, as places. */
export function* places(graph, parents = []) {
  for (const node of graph?.nodes ?? []) {
    const place = { node, graph, parents }
    yield place
    if (node.subgraph && parents.length < FARTHEST) yield* places(node.subgraph, [...parents, place])
  }
}

/** '12:5' for node 5 in the subgraph node 12. */
export const executionId = ({ node, parents }) => [...parents.map((parent) => parent.node.id), node.id].join(':')

/** The place with this execution id, or null. */
export function placeOf(graph, id) {
  const parents = []
  for (const part of String(id).split(':')) {
    const around = parents.at(-1)
    const within = around ? around.node.subgraph : graph
    const node = within?.nodes?.find((n) => String(n.id) === part)
    if (!node) return null
    parents.push({ node, graph: within, parents: [...parents] })
  }
  return parents.at(-1)
}

/** Where the value of an input comes from: a place, through reroutes and subgraph borders; null if from nowhere. */
export function sourceOf(place, input) {
  for (let hop = 0; hop < FARTHEST && input?.link != null; hop += 1) {
    [place, input] = outermost(place, input)
    const link = place && linkOf(place.graph, input?.link)
    if (!link) return null
    let next = { ...place, node: nodeOf(place.graph, link.origin_id) }
    let slot = link.origin_slot
    while (next.node?.subgraph) {
      const inner = next.node.subgraph
      const inside = linkOf(inner, inner.outputs?.[slot]?.linkIds?.[0])
      if (!inside) return null
      next = { node: nodeOf(inner, inside.origin_id), graph: inner, parents: [...next.parents, next] }
      slot = inside.origin_slot
    }
    if (!next.node) return null
    if (next.node.type !== 'Reroute') return next
    place = next
    input = next.node.inputs?.[0]
  }
  return null
}

/** The place and the input through which a value enters the outermost of the subgraphs around it. */
function outermost(place, input) {
  for (let link = linkOf(place.graph, input.link); String(link?.origin_id) === SUBGRAPH_INPUTS; link = place && linkOf(place.graph, input?.link)) {
    place = place.parents.at(-1)
    input = place?.node.inputs?.[link.origin_slot]
  }
  return [place, input]
}

/** The places that take what an output gives, through reroutes and subgraph borders. */
export function targetsOf(place, slot, hop = 0) {
  const links = place.node.outputs?.[slot]?.links ?? []
  return hop > FARTHEST ? [] : links.flatMap((id) => arrivals(place, linkOf(place.graph, id), hop))
}

function arrivals(place, link, hop) {
  if (!link) return []
  if (String(link.target_id) === SUBGRAPH_OUTPUTS) {
    const parent = place.parents.at(-1)
    return parent ? targetsOf(parent, link.target_slot, hop + 1) : []
  }
  const target = { ...place, node: nodeOf(place.graph, link.target_id) }
  if (!target.node) return []
  if (target.node.type === 'Reroute') return targetsOf(target, 0, hop + 1)
  const inner = target.node.subgraph
  if (!inner) return [target]
  const within = { graph: inner, parents: [...place.parents, target] }
  const entered = inner.inputs?.[link.target_slot]?.linkIds ?? []
  return entered.flatMap((id) => arrivals(within, linkOf(inner, id), hop + 1))
}

/** Execution ids of the nodes behind an output, nearest first; a further sampler is not passed. */
export function behind(place, slot) {
  const found = []
  let front = targetsOf(place, slot)
  while (front.length && found.length < 1000) {
    const fresh = front.filter((p) => !p.node.inputs?.some((i) => i.type === 'MODEL') && !found.includes(executionId(p)))
    found.push(...new Set(fresh.map(executionId)))
    front = fresh.flatMap((p) => (p.node.outputs ?? []).flatMap((_, i) => targetsOf(p, i)))
  }
  return found
}

/**
 * The widget that holds a prompt's text: {widget}, or {why} in a sentence where there is none to change.
 * A text that comes in by a link is followed to the widget that holds it.
 */
export function textWidget(graph, id, prompt) {
  const start = id === null ? null : placeOf(graph, id)
  if (!start) return { why: 'The node that holds the prompt is not in this workflow, so the text cannot be changed here.' }
  const seen = new Set()
  const candidates = []
  let front = [start]
  while (front.length && seen.size < FARTHEST) {
    const next = []
    for (const place of front) {
      if (seen.has(place.node)) continue
      seen.add(place.node)
      const linked = (place.node.inputs ?? []).filter((i) => i.link != null && carriesText(i))
      const fed = new Set(linked.map((i) => i.widget?.name ?? i.name))
      candidates.push(...(place.node.widgets ?? []).filter((w) => typeof w.value === 'string' && !fed.has(w.name) && isText(w)))
      next.push(...linked.map((i) => sourceOf(place, i)).filter(Boolean))
      candidates.push(...linked.map((i) => promoted(place, i)).filter(Boolean))
    }
    front = next
  }
  const same = candidates.find((w) => w.value === prompt)
  const only = seen.size === 1 || candidates.length === 1 ? preferred(candidates) : null
  if (same ?? only) return { widget: same ?? only }
  const title = start.node.title ?? 'the node'
  return { why: `The text of “${title}” is put together by other nodes, so it cannot be changed here.` }
}

/** The widget on the subgraph's node in which an input's value is set, where the widget was promoted to there. */
function promoted(place, input) {
  const [around, entrance] = outermost(place, input)
  if (around === place || !entrance || entrance.link != null) return null
  return around.node.widgets?.find((w) => w.name === (entrance.widget?.name ?? entrance.name) && typeof w.value === 'string') ?? null
}

const carriesText = (input) => input.type === 'STRING' || input.type === '*' || TEXT_NAMES.includes(input.name)
const isText = (widget) => ['customtext', 'text', 'string', 'STRING'].includes(widget.type) || TEXT_NAMES.includes(widget.name)
const preferred = (widgets) => TEXT_NAMES.map((name) => widgets.find((w) => w.name === name)).find(Boolean) ?? widgets[0] ?? null

/** Put a text into a widget as one step of the host's undo. */
export function setText(app, widget, text) {
  capture(app)
  widget.value = text
  if (!widget.element) widget.callback?.(text)
  app.canvas?.setDirty?.(true, true)
  capture(app)
}

/** Keep a report in its node, so that it is saved with the workflow; that alone is no step to undo. */
export function store(app, node, report) {
  node.properties.dejavu = report
  const state = tracker(app)?.activeState
  const graphs = [state, ...(state?.definitions?.subgraphs ?? [])].filter((g) => g && (node.graph?.isRootGraph ?? true ? g === state : g.id === node.graph.id))
  keepIn(graphs.flatMap((g) => g.nodes ?? []).find((n) => String(n.id) === String(node.id) && n.type === node.type), report)
}

/**
 * The workflow whose run has given out this output, where it waits in another tab than the one that is open; ``known`` is
 * that workflow where we have queued it ourselves, which the host does not keep account of.
 */
export function elsewhere(app, id, output, known = null) {
  const { openWorkflows = [], activeWorkflow } = app.extensionManager?.workflow ?? {}
  const queued = known ?? openWorkflows.find((one) => one.changeTracker?.nodeOutputs?.[id] === output)
  return queued && queued !== activeWorkflow ? queued : null
}

/** Keep a report in a node of a workflow in another tab: it is shown when that is opened again. */
export function storeElsewhere(workflow, id, report) {
  const state = workflow.changeTracker.activeState
  let graph = state, saved = null
  for (const part of String(id).split(':')) {
    saved = graph?.nodes?.find((n) => String(n.id) === part)
    graph = state.definitions?.subgraphs?.find((inner) => inner.id === saved?.type)
  }
  keepIn(saved, report)
}

function keepIn(saved, report) {
  if (saved) saved.properties = { ...saved.properties, dejavu: JSON.parse(JSON.stringify(report)) }
}

const tracker = (app) => app.extensionManager?.workflow?.activeWorkflow?.changeTracker

function capture(app) {
  const found = tracker(app)
  if (found?.captureCanvasState) found.captureCanvasState()
  else found?.checkState?.()
}

const linkOf = (graph, id) => (id == null ? null : (graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id] ?? null))
const nodeOf = (graph, id) => graph.getNodeById?.(id) ?? graph.nodes?.find((n) => String(n.id) === String(id)) ?? null
