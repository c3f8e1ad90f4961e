import { expect, it, vi } from 'vitest'
import { behind, elsewhere, executionId, placeOf, places, rootGraph, setText, sourceOf, store, storeElsewhere, textWidget } from '../../web/graph.js'

/** A graph from nodes {id, type, inputs: {name: [from, slot]}}; -10 and -20 are a subgraph's borders. */
function graphOf(nodes, { inputs = 0, outputs = [], ...more } = {}) {
  const graph = { links: new Map(), nodes: [], inputs: Array.from({ length: inputs }, () => ({ linkIds: [] })), outputs: [], ...more }
  let last = 0
  graph.nodes = nodes.map(({ inputs: taken = {}, outputs: given = 2, ...node }) => ({
    properties: {}, widgets: [], ...node, graph,
    inputs: Object.keys(taken).map((name) => ({ name, type: node.types?.[name] ?? '*', link: null })),
    outputs: Array.from({ length: given }, () => ({ links: [] })),
  }))
  graph.getNodeById = (id) => graph.nodes.find((n) => n.id === id)
  const connect = (origin, slot, target, targetSlot) => {
    last += 1
    graph.links.set(last, { origin_id: origin, origin_slot: slot, target_id: target, target_slot: targetSlot })
    if (origin === -10) graph.inputs[slot].linkIds.push(last)
    else graph.getNodeById(origin).outputs[slot].links.push(last)
    return last
  }
  nodes.forEach((node, i) => Object.values(node.inputs ?? {}).forEach((from, k) => {
    if (from) graph.nodes[i].inputs[k].link = connect(from[0], from[1], node.id, k)
  }))
  graph.outputs = outputs.map(([origin, slot], i) => ({ linkIds: [connect(origin, slot, -20, i)] }))
  return graph
}

const text = (value, name = 'text') => ({ name, type: 'customtext', value })

it('finds nodes by execution id, in subgraphs too', () => {
  const inner = graphOf([{ id: 5, type: 'Inner' }])
  const graph = graphOf([{ id: 1 }, { id: 12, subgraph: inner }])
  expect([...places(graph)].map(executionId)).toEqual(['1', '12', '12:5'])
  expect(placeOf(graph, '12:5').node.type).toBe('Inner')
  expect(placeOf(graph, '12:6')).toBeNull()
  expect(placeOf(graph, '1:6')).toBeNull()
})

it('follows an input through reroutes and out of a subgraph', () => {
  const inner = graphOf([{ id: 5, inputs: { monitor: [-10, 0] } }], { inputs: 1 })
  const graph = graphOf([{ id: 1, type: 'Monitor' }, { id: 2, type: 'Reroute', inputs: { '': [1, 1] } }, { id: 12, subgraph: inner, inputs: { monitor: [2, 0] } }])
  const place = placeOf(graph, '12:5')
  expect(executionId(sourceOf(place, place.node.inputs[0]))).toBe('1')
})

it('follows an input into a subgraph', () => {
  const inner = graphOf([{ id: 5, type: 'Monitor' }], { outputs: [[5, 1]] })
  const graph = graphOf([{ id: 12, subgraph: inner }, { id: 3, inputs: { monitor: [12, 0] } }])
  const place = placeOf(graph, '3')
  expect(executionId(sourceOf(place, place.node.inputs[0]))).toBe('12:5')
})

it('finds what lies behind an output, up to the next sampler', () => {
  const inner = graphOf([{ id: 5, inputs: { samples: [-10, 0] } }], { inputs: 1, outputs: [[5, 0]] })
  const graph = graphOf([
    { id: 7 }, { id: 12, subgraph: inner, inputs: { samples: [7, 0] } }, { id: 8, inputs: { images: [12, 0] } },
    { id: 9, inputs: { model: null, latent: [7, 0] }, types: { model: 'MODEL' } }, { id: 10, inputs: { samples: [9, 0] } },
    { id: 11, inputs: { mask: [7, 1] } },
  ])
  expect(behind(placeOf(graph, '7'), 0)).toEqual(['12:5', '8'])
})

it('passes the borders of subgraphs whose ids are strings', () => {
  const inner = graphOf([{ id: '5', inputs: { monitor: [-10, 0] } }, { id: '6', inputs: { samples: [-10, 0] } }], { inputs: 1, outputs: [['6', 0]] })
  const graph = graphOf([{ id: '1', type: 'Monitor' }, { id: '12', subgraph: inner, inputs: { monitor: ['1', 1] } }, { id: '8', inputs: { images: ['12', 0] } }])
  for (const link of inner.links.values()) {
    link.origin_id = String(link.origin_id)
    link.target_id = String(link.target_id)
  }
  const place = placeOf(graph, '12:5')
  expect(executionId(sourceOf(place, place.node.inputs[0]))).toBe('1')
  expect(behind(placeOf(graph, '12:6'), 0)).toEqual(['8'])
})

it('finds a promoted text in the node of the outermost subgraph', () => {
  const inner = graphOf([{ id: 3, widgets: [text('as it was')], inputs: { text: [-10, 0] }, types: { text: 'STRING' } }], { inputs: 1 })
  const middle = graphOf([{ id: 7, subgraph: inner, widgets: [text('as it was')], inputs: { text: [-10, 0] } }], { inputs: 1 })
  const graph = graphOf([{ id: 12, subgraph: middle, widgets: [text('a cat')], inputs: { text: null } }])
  expect(textWidget(graph, '12:7:3', 'a cat').widget).toBe(graph.nodes[0].widgets[0])
  expect(textWidget(graph, '12:7:3', 'since changed').widget).toBe(graph.nodes[0].widgets[0])
})

it('keeps a report in the workflow that queued it, which waits in another tab', () => {
  const output = { dejavu: [{ prompt: 'a cat' }] }
  const nodes = () => [{ id: 12, type: 'inner-id' }]
  const waiting = { changeTracker: { nodeOutputs: { '12:7': output }, activeState: { nodes: nodes(), definitions: { subgraphs: [{ id: 'inner-id', nodes: [{ id: 7 }] }] } } } }
  const open = { changeTracker: { nodeOutputs: { '12:7': { ...output } }, activeState: { nodes: nodes() } } }
  const app = { extensionManager: { workflow: { openWorkflows: [open, waiting], activeWorkflow: open } } }
  expect(elsewhere(app, '12:7', output)).toBe(waiting)
  expect(elsewhere(app, '12:7', open.changeTracker.nodeOutputs['12:7'])).toBeNull()
  storeElsewhere(waiting, '12:7', output.dejavu[0])
  expect(waiting.changeTracker.activeState.definitions.subgraphs[0].nodes[0].properties.dejavu).toEqual({ prompt: 'a cat' })
})

it('ends where links go round', () => {
  const graph = graphOf([{ id: 1, type: 'Reroute', inputs: { '': [2, 0] } }, { id: 2, type: 'Reroute', inputs: { '': [1, 0] } }, { id: 3, inputs: { a: [1, 0] } }])
  const place = placeOf(graph, '3')
  expect(sourceOf(place, place.node.inputs[0])).toBeNull()
  expect(behind(placeOf(graph, '1'), 0).length).toBeGreaterThanOrEqual(0)
})

it('finds the widget of a prompt', () => {
  const graph = graphOf([{ id: 3, widgets: [text('other', 'note'), text('a cat')] }])
  expect(textWidget(graph, '3', 'a cat').widget.value).toBe('a cat')
  expect(textWidget(graph, '3', 'since changed').widget.name).toBe('text')
  expect(textWidget(graph, '9', 'a cat').why).toContain('not in this workflow')
  expect(textWidget(graph, null, 'a cat').why).toContain('not in this workflow')
})

it('follows a linked text to the widget that holds it', () => {
  const graph = graphOf([
    { id: 1, type: 'PrimitiveNode', widgets: [text('a cat', 'value')] },
    { id: 3, widgets: [text('stale')], inputs: { text: [1, 0] }, types: { text: 'STRING' } },
  ])
  expect(textWidget(graph, '3', 'a cat').widget.name).toBe('value')
  expect(textWidget(graph, '3', 'since changed').widget.name).toBe('value')
})

it('says so where several texts are joined', () => {
  const graph = graphOf([
    { id: 1, widgets: [text('a')] }, { id: 2, widgets: [text('cat')] },
    { id: 4, inputs: { string_a: [1, 0], string_b: [2, 0] }, types: { string_a: 'STRING', string_b: 'STRING' } },
    { id: 3, title: 'Prompt', inputs: { text: [4, 0] }, types: { text: 'STRING' } },
  ])
  expect(textWidget(graph, '3', 'a cat').why).toBe('The text of “Prompt” is put together by other nodes, so it cannot be changed here.')
})

it.each(['captureCanvasState', 'checkState'])('sets a text as one step of the host: %s', (name) => {
  const seen = [], widget = { value: 'old', callback: vi.fn() }
  const changeTracker = { [name]: () => seen.push(widget.value) }
  setText({ extensionManager: { workflow: { activeWorkflow: { changeTracker } } } }, widget, 'new')
  expect(seen).toEqual(['old', 'new'])
  expect(widget.callback).toHaveBeenCalledWith('new')
})

it('keeps a report in its node without a step to undo', () => {
  const graph = graphOf([{ id: 7, type: 'DejaVuVerdict' }], { isRootGraph: true })
  const activeState = { nodes: [{ id: 7, type: 'DejaVuVerdict', properties: { other: 1 } }] }
  const app = { graph, extensionManager: { workflow: { activeWorkflow: { changeTracker: { activeState } } } } }
  store(app, rootGraph(app).nodes[0], { a: 1 })
  expect(graph.nodes[0].properties.dejavu).toEqual({ a: 1 })
  expect(activeState.nodes[0].properties).toEqual({ other: 1, dejavu: { a: 1 } })
})
