/** The sidebar: this session's runs, a filter, and the details of the one that was clicked. */

import { badge, button, make } from './dom.js'
import { createPanel } from './panel.js'
import { number } from './report.js'
import { filtered, highestScore, labelOf } from './runs.js'

const LABELS = ['Flagged', 'Not flagged', 'No verdict']

/** {element, remove()} that follows ``runs``; ``copy`` puts text on the clipboard, ``queue`` queues the workflow. */
export function createSidebar(runs, host) {
  let chosen = null
  const panel = createPanel(host)
  const query = make('input', { type: 'search', placeholder: 'Words of the prompt', 'aria-label': 'Filter by words', oninput: () => renderList() })
  const label = make('select', { 'aria-label': 'Filter by verdict', onchange: () => renderList() },
    make('option', { value: '' }, 'All verdicts'), LABELS.map((name) => make('option', { value: name }, name)))
  const count = make('p', { class: 'dejavu-quiet', role: 'status' })
  const list = make('ul', { class: 'dejavu-runs' })
  const overview = make('div', { class: 'dejavu-overview' }, make('div', { class: 'dejavu-filter' }, query, label), count, list)
  const back = button('Back to the runs', () => choose(null))
  const details = make('div', { class: 'dejavu-details', hidden: true }, back, panel.element)
  const element = make('div', { class: 'dejavu-sidebar', role: 'region', 'aria-label': 'Déjà Vu: runs of this session' },
    make('h3', {}, 'Déjà Vu'), overview, details)

  function choose(key) {
    const from = chosen
    chosen = key
    overview.hidden = key !== null
    details.hidden = key === null
    renderDetails()
    if (key !== null) back.focus()
    else [...list.querySelectorAll('button')].find((b) => b.dataset.key === from)?.focus()
  }

  function renderDetails() {
    const run = runs.all.find((r) => r.key === chosen)
    if (!run) return
    panel.show(run.report, { document: run.document, live: !run.finished })
    panel.images(run.images)
  }

  function renderList() {
    const shown = filtered(runs.all, query.value, label.value)
    count.textContent = runs.all.length === 0 ? 'No run yet. Queue a workflow with a Monitor and a Verdict, or an Explain node.'
      : `${shown.length} of ${runs.all.length} ${runs.all.length === 1 ? 'run' : 'runs'} of this session`
    const focused = list.contains(document.activeElement) ? document.activeElement.dataset.key : null
    list.replaceChildren(...shown.map((run) => make('li', {}, entry(run))))
    if (focused) [...list.querySelectorAll('button')].find((b) => b.dataset.key === focused)?.focus()
  }

  function entry(run) {
    const { report, images, time, finished } = run
    const thumbnail = images[0]
      ? make('img', { src: images[0], alt: '', loading: 'lazy', onerror: (event) => event.target.remove() })
      : make('span', { class: 'dejavu-no-image', 'aria-hidden': 'true' })
    const when = new Date(time).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit', hourCycle: 'h23' })
    return button('', () => choose(run.key), { class: 'dejavu-run', 'data-key': run.key }).appendChild(
      make('span', { class: 'dejavu-run-inside' }, make('span', { class: 'dejavu-thumbnail' }, thumbnail),
        make('span', { class: 'dejavu-run-text' },
          make('span', {}, badge(labelOf(report))),
          make('span', { class: 'dejavu-quiet' }, `score ${number(highestScore(report))} · ${when}${finished ? '' : ' · sampling'}`),
          make('span', { class: 'dejavu-run-prompt', dir: 'auto' }, report.prompt || '(no prompt text)'))),
    ).parentElement
  }

  const stop = runs.listen(() => {
    renderList()
    renderDetails()
  })
  renderList()
  return {
    element,
    remove() {
      stop()
      panel.remove()
    },
  }
}
