/** Registers the overlay with the host: the nodes' panels, the sidebar and the settings. The only module with effects. */

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { withCalibration } from './calibrate.js'
import { make } from './dom.js'
import { behind, elsewhere, executionId, placeOf, places, rootGraph, setText, sourceOf, store, storeElsewhere, textWidget } from './graph.js'
import { createMachine } from './machine.js'
import { createPanel } from './panel.js'
import { readReport } from './report.js'
import { createRuns } from './runs.js'
import { createSidebar } from './sidebar.js'

// One hue each: lightness and line thickness carry the order in any eye.
const PALETTES = ['vermilion', 'blue', 'grey']
const ALPHA = 0.01
const RUNS_KEPT = 50
const SHOWS = ['DejaVuVerdict', 'DejaVuExplain']
const SIZE = [440, 640] // of a fresh node; all of a report fits
const BELOW_OUTPUTS = 100 // more in Nodes 2.0, where the panel begins below the outputs
const LEAST_HEIGHT = 220
const WIDGET = 'dejavu_report'
const SHEET = new URL('./dejavu.css', import.meta.url).href
const MOUNT_TRIES = 20
const MOUNT_PAUSE = 150 // milliseconds

const panels = new Map()
const runs = createRuns(RUNS_KEPT)
const calibrations = new Map() // id of a prompt that was queued to calibrate -> the workflow it is of
let sidebar = null
const setting = (id) => app.extensionManager.setting.get(id)

app.registerExtension({
  name: 'dejavu.overlay',
  settings: [
    {
      id: 'DejaVu.Palette',
      category: ['Déjà Vu', 'Overlay', 'Palette'],
      name: 'Palette of the words',
      tooltip: 'The hue that shades significant words and draws the curve. The thickness of the line tells the same.',
      type: 'combo',
      options: PALETTES,
      defaultValue: PALETTES[0],
      onChange: (palette) => { document.body.dataset.dejavuPalette = PALETTES.includes(palette) ? palette : PALETTES[0] },
    },
    {
      id: 'DejaVu.Alpha',
      category: ['Déjà Vu', 'Monitor', 'Alpha'],
      name: 'Alpha of new Monitor nodes',
      tooltip: 'An image is flagged when its p-value is at most this. Nodes that exist already keep theirs.',
      type: 'number',
      attrs: { min: 0.001, max: 0.999, step: 0.001, minFractionDigits: 1, maxFractionDigits: 4 },
      defaultValue: ALPHA,
    },
    {
      id: 'DejaVu.RunsKept',
      category: ['Déjà Vu', 'Sidebar', 'Runs'],
      name: 'Runs kept in the sidebar',
      tooltip: 'Of this session, the newest.',
      type: 'number',
      attrs: { min: 1, max: 1000 },
      defaultValue: RUNS_KEPT,
      onChange: (count) => runs.keep(Number(count) || RUNS_KEPT),
    },
    {
      id: 'DejaVu.Machine',
      category: ['Déjà Vu', 'This machine', 'Machine'],
      name: 'What works on this machine',
      tooltip: 'Versions, devices, precisions and the folder of calibrations, to be copied into a report of a fault.',
      type: () => make('div', { class: 'dejavu-sidebar dejavu-setting' }, make('link', { rel: 'stylesheet', href: SHEET }), createMachine({ machine, copy })),
      defaultValue: null,
    },
  ],

  setup() {
    api.addEventListener('dejavu.run', ({ detail }) => onRun(detail))
    api.addEventListener('executed', ({ detail }) => onExecuted(detail))
    api.addEventListener('graphChanged', () => everyPanel((panel) => panel.refresh()))
    api.addEventListener('status', ({ detail }) => {
      if (detail?.exec_info?.queue_remaining !== 0) return
      runs.idle()
      everyPanel((panel) => panel.idle())
    })
    app.extensionManager.registerSidebarTab({
      id: 'dejavu',
      icon: 'pi pi-eye',
      title: 'Déjà Vu',
      tooltip: 'Déjà Vu: runs of this session',
      type: 'custom',
      render(element) {
        sidebar?.remove()
        sidebar = createSidebar(runs, { copy, queue, machine, sheet: SHEET, calibrate: calibrateRun })
        element.replaceChildren(sidebar.element)
      },
      destroy() {
        sidebar?.remove()
        sidebar = null
      },
    })
  },

  nodeCreated(node) {
    if (node.comfyClass === 'DejaVuMonitor') {
      const alpha = node.widgets?.find((widget) => widget.name === 'alpha')
      if (alpha) alpha.value = Number(setting('DejaVu.Alpha')) || ALPHA
    }
    if (SHOWS.includes(node.comfyClass)) addPanel(node)
  },

  loadedGraphNode(node) {
    if (panels.has(node)) showDocument(node, node.properties?.dejavu)
  },
})

function addPanel(node) {
  const panel = createPanel({ copy, queue, sheet: SHEET, text: textSource, calibrate: (count) => calibrateOf(node, count) })
  panels.set(node, panel)
  const widget = node.addDOMWidget(WIDGET, 'dejavu', panel.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => LEAST_HEIGHT,
  })
  widget.serialize = false
  if (node.comfyClass === 'DejaVuVerdict') beginBeside(node, panel.element, widget.margin ?? 10)
  forwardPointer(panel.element)
  node.setSize?.([Math.max(SIZE[0], node.size[0]), Math.max(SIZE[1] + (setting('Comfy.VueNodes.Enabled') ? BELOW_OUTPUTS : 0), node.size[1])])
  mount(node)
  const { onRemoved, onConfigure } = node
  node.onRemoved = function (...given) {
    onRemoved?.apply(this, given)
    panel.remove()
    panel.element.remove()
    panels.delete(node)
  }
  node.onConfigure = function (...given) {
    onConfigure?.apply(this, given)
    showDocument(node, node.properties?.dejavu)
  }
}

/** In the classic renderer the panel begins below the inputs, in the room beside the outputs, whose names are cut out. */
function beginBeside(node, element, margin) {
  const row = window.LiteGraph?.NODE_SLOT_HEIGHT ?? 20, edge = 6
  node.widgets_start_y = row * node.inputs.length + edge
  element.style.setProperty('--dejavu-cut', `${row * node.outputs.length + edge - node.widgets_start_y - margin}px`)
}

/** In Nodes 2.0 of older front ends no pack's widget is shown: there the panel goes into the node's element itself. */
function mount(node, patience = MOUNT_TRIES) {
  const element = panels.get(node)?.element
  if (!element || element.isConnected || !setting('Comfy.VueNodes.Enabled')) return
  // The host makes nodes that are never shown, when a subgraph is made for one: they have the ids of those that are.
  const isOpen = app.canvas?.graph?.nodes?.includes(node)
  const shown = isOpen && document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"]`)
  if (shown && patience < MOUNT_TRIES - 2) shown.append(element)
  else if (patience > 0) setTimeout(() => mount(node, patience - 1), MOUNT_PAUSE)
}

function everyPanel(act) {
  panels.forEach(act)
  if (sidebar) act(sidebar)
}

function showDocument(node, document, more = {}) {
  const report = readReport(document)
  if (report) panels.get(node)?.show(report, { document, ...more })
  mount(node)
}

function keepDocument(node, document, promptId) {
  if (!readReport(document)) return
  store(app, node, document)
  showDocument(node, document, { promptId })
}

/** A run that goes on or has ended: to its nodes, and to the list. */
function onRun({ run, monitor, prompt_id: promptId, workflow, finished, report: document }) {
  const report = readReport(document)
  if (!report) return
  const key = `${promptId} ${run}`
  const begins = !runs.all.some((known) => known.key === key)
  runs.put({ key, promptId, monitor: String(monitor), workflow, report, document, finished })
  if (workflow != null && workflow !== rootGraph(app)?.id) return // it waits in another tab
  for (const { node } of readersOf(monitor)) {
    if (begins) panels.get(node)?.images([])
    if (finished) keepDocument(node, document, promptId)
    else showDocument(node, document, { live: true, begins, promptId })
  }
}

/** The Verdict nodes that read this monitor, or the Explain node itself. */
function readersOf(monitor) {
  const graph = rootGraph(app)
  const own = placeOf(graph, monitor)
  if (!own) return []
  if (SHOWS.includes(own.node.comfyClass)) return [own]
  return [...places(graph)].filter((place) => {
    const input = place.node.comfyClass === 'DejaVuVerdict' && place.node.inputs?.find((i) => i.name === 'monitor')
    const source = input && sourceOf(place, input)
    return source && executionId(source) === String(monitor)
  })
}

/** What a node gives out: a report for its panel, and the images behind a Verdict's latent for its map and the list. */
function onExecuted({ node: id, display_node: shownId, prompt_id: promptId, output }) {
  const document = output?.dejavu?.[0]
  const waiting = elsewhere(app, id, output, calibrations.get(promptId))
  const own = (document && !waiting && placeOf(rootGraph(app), shownId ?? id)) || null
  if (document) listKept(promptId, shownId ?? id, document, own && monitorOf(own), (waiting?.activeState ?? rootGraph(app))?.id)
  if (waiting) {
    if (readReport(document)) storeElsewhere(waiting, shownId ?? id, document)
    return
  }
  if (own && panels.has(own.node)) keepDocument(own.node, document, promptId)
  const images = output?.images
  if (!Array.isArray(images) || !images.length) return
  const urls = images.map(({ filename, subfolder = '', type = 'output' }) => api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`))
  for (const place of places(rootGraph(app))) {
    if (place.node.comfyClass !== 'DejaVuVerdict') continue
    if (![id, shownId].some((made) => behind(place, 0).includes(String(made)))) continue
    panels.get(place.node)?.images(urls)
    const monitor = monitorOf(place)
    const mine = runs.all.find((r) => r.promptId === promptId && monitor !== null && r.monitor === monitor)
    if (mine) runs.imagesFor(mine.key, urls)
  }
}

/** A report on a run of an earlier execution, which the host has answered from its cache: a card of its own. */
function listKept(promptId, node, document, monitor, workflow) {
  const report = readReport(document)
  const sampled = runs.all.some((r) => r.promptId === promptId && (monitor === null || r.monitor === monitor))
  if (!report || sampled) return
  runs.put({ key: `${promptId} ${node}`, promptId, monitor, workflow, report, document, finished: true, kept: true })
}

/** The execution id of the Monitor that a Verdict reads, or of the node itself where it measures by itself. */
function monitorOf(place) {
  if (place.node.comfyClass !== 'DejaVuVerdict') return executionId(place)
  const source = sourceOf(place, place.node.inputs?.find((i) => i.name === 'monitor'))
  return source && executionId(source)
}

/** Queue the workflow once more, so that its run measures ordinary prompts first: {promptId} or {why}. */
async function calibrate(id, count) {
  try {
    const { output, workflow } = await app.graphToPrompt()
    const found = withCalibration(output, id, count)
    if (found.why) return found
    // Not as the host's own button does it: that would change the seed in the graph for the run after.
    const { prompt_id: promptId, node_errors: errors } = await api.queuePrompt(0, { output: found.output, workflow })
    const [fault] = Object.values(errors ?? {}).flatMap((one) => one.errors ?? [])
    if (fault) return { why: `Not queued: ${fault.message}${fault.details ? ` (${fault.details})` : ''}.` }
    calibrations.set(promptId, app.extensionManager.workflow?.activeWorkflow)
    return { promptId }
  } catch (error) {
    return { why: `Not queued: ${error.message}. Queue the workflow as usual to see what is missing.` }
  }
}

function calibrateOf(node, count) {
  const place = [...places(rootGraph(app))].find((one) => one.node === node)
  return calibrate(executionId(place), count)
}

function calibrateRun({ monitor, workflow }, count) {
  if (workflow != null && workflow !== rootGraph(app)?.id) return { why: 'This run is of another workflow: open that, then press the button again.' }
  return calibrate(monitor, count)
}

/** What works on this machine, line by line. */
async function machine() {
  const answer = await api.fetchApi('/dejavu/doctor')
  if (!answer.ok) throw Error(`${answer.status} ${answer.statusText}`)
  return (await answer.json()).lines
}

/** What panels may do with the prompt's text. */
function textSource(promptNode, prompt) {
  const found = textWidget(rootGraph(app), promptNode, prompt)
  if (!found.widget) return found
  return {
    value: found.widget.value,
    set: (text) => {
      setText(app, found.widget, text)
      everyPanel((panel) => panel.refresh())
    },
  }
}

function queue() {
  app.queuePrompt(0, 1)
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    return false
  }
}

/** Zooming and panning work over the panel as over the rest of a node. */
function forwardPointer(element) {
  element.addEventListener('wheel', (event) => {
    const scrolls = element.scrollHeight > element.clientHeight
    if (event.ctrlKey || event.metaKey || !scrolls) app.canvas.processMouseWheel?.(event)
  })
  for (const [name, handler] of [['pointerdown', 'processMouseDown'], ['pointermove', 'processMouseMove'], ['pointerup', 'processMouseUp']]) {
    element.addEventListener(name, (event) => {
      const middle = name === 'pointermove' ? (event.buttons & 4) === 4 : event.button === 1
      if (middle) app.canvas[handler]?.(event)
    })
  }
}
