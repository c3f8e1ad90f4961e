/** The sidebar: this session's runs, a filter, the details of the one that was clicked, two side by side, the machine. */

import { sideBySide } from './compare.js'
import { badge, button, make } from './dom.js'
import { createMachine } from './machine.js'
import { createPanel } from './panel.js'
import { number, pText } from './report.js'
import { filtered, labelOf, worstOf } from './runs.js'

const LABELS = ['Flagged', 'Not flagged', 'No verdict']

/**
 * {element, remove(), refresh(), idle()} that follows ``runs``. ``host`` as a panel's, but ``calibrate(run, count)`` gets the run
 * that is shown, and ``machine()`` says what works on this machine.
 */
export function createSidebar(runs, host) {
  let chosen = null, shown = null
  let picked = [] // keys of the runs to be compared, two at most
  const runOf = (key) => runs.all.find((r) => r.key === key)
  let awaited = null // {promptId} of a calibration that was asked for: its run is shown once it begins
  const panel = createPanel({ ...host, calibrate: host.calibrate && calibrate })
  const query = make('input', { type: 'search', placeholder: 'Words of the prompt', 'aria-label': 'Filter by words', oninput: () => renderList() })
  const label = make('select', { 'aria-label': 'Filter by verdict', onchange: () => renderList() },
    make('option', { value: '' }, 'All verdicts'), LABELS.map((name) => make('option', { value: name }, name)))
  const count = make('p', { class: 'dejavu-quiet', role: 'status' })
  const compared = make('div', {})
  const list = make('ul', { class: 'dejavu-runs' })
  const overview = make('div', { class: 'dejavu-overview dejavu-list-column' },
    make('div', { class: 'dejavu-filter' }, query, label), count, compared, list, createMachine(host))
  const back = button('Back to the runs', () => choose(null), { class: 'dejavu-back' })
  const details = make('div', { class: 'dejavu-details', hidden: true }, back, panel.element)
  const columns = make('div', { class: 'dejavu-columns' }, overview, details)
  const element = make('div', { class: 'dejavu-sidebar', role: 'region', 'aria-label': 'Déjà Vu: runs of this session' },
    make('h3', {}, 'Déjà Vu'), columns)

  async function calibrate(count) {
    const found = await host.calibrate(runOf(chosen), count)
    awaited = found.why ? null : { promptId: found.promptId }
    return found
  }

  function follow() {
    const [newest] = runs.all
    if (!awaited || chosen === null || newest.promptId !== awaited.promptId) return
    chosen = newest.key
    awaited = null
  }

  function choose(key) {
    const from = chosen
    chosen = key
    columns.classList.toggle('dejavu-chosen', key !== null)
    details.hidden = key === null
    renderDetails()
    renderList()
    if (key !== null) back.focus()
    else entryOf(from)?.focus()
  }

  const entryOf = (key) => [...list.querySelectorAll('.dejavu-run')].find((b) => b.dataset.key === key)

  function renderDetails() {
    const run = runOf(chosen)
    if (!run) return
    if (shown !== chosen) panel.show(null)
    shown = chosen
    panel.show(run.report, { document: run.document, live: !run.finished, ended: run.ended, promptId: run.promptId })
    panel.images(run.images)
  }

  function renderList() {
    const found = filtered(runs.all, query.value, label.value)
    count.textContent = runs.all.length === 0 ? 'No run yet. Queue a workflow with a Monitor and a Verdict, or an Explain node.'
      : `${found.length} of ${runs.all.length} ${runs.all.length === 1 ? 'run' : 'runs'} of this session`
    const focused = list.contains(document.activeElement) ? [document.activeElement.className, document.activeElement.dataset.key] : null
    list.replaceChildren(...found.map((run) => make('li', {}, entry(run), runs.all.length > 1 && pick(run))))
    if (focused) [...list.querySelectorAll('button')].find((b) => b.className === focused[0] && b.dataset.key === focused[1])?.focus()
    renderComparison()
  }

  function entry(run) {
    const { report, images, time, finished, kept, ended } = run
    const thumbnail = images[0]
      ? make('img', { src: images[0], alt: '', loading: 'lazy', onerror: (event) => event.target.remove() })
      : make('span', { class: 'dejavu-no-image', 'aria-hidden': 'true' })
    const when = timeOf(time)
    const worst = worstOf(report)
    const told = [pText(worst), `score ${number(worst.score)}`, when, kept && 'from the cache', !finished && 'sampling', ended && 'ended early'].filter(Boolean).join(' · ')
    return button('', () => choose(run.key), { class: 'dejavu-run', 'data-key': run.key, 'aria-current': run.key === chosen && 'true' }).appendChild(
      make('span', { class: 'dejavu-run-inside' }, make('span', { class: 'dejavu-thumbnail' }, thumbnail),
        make('span', { class: 'dejavu-run-text' },
          make('span', {}, badge(labelOf(report))),
          make('span', { class: 'dejavu-quiet' }, told),
          make('span', { class: 'dejavu-run-prompt', dir: 'auto' }, report.prompt || '(no prompt text)'))),
    ).parentElement
  }

  /** Takes a run to be compared; a third one takes the place of the first. */
  function pick(run) {
    const isPicked = picked.includes(run.key)
    const change = () => {
      picked = isPicked ? picked.filter((key) => key !== run.key) : [...picked, run.key].slice(-2)
      renderList()
    }
    return button('Compare', change, { class: 'dejavu-pick', 'data-key': run.key, 'aria-pressed': String(isPicked), title: 'Choose two runs to see them side by side' })
  }

  function renderComparison() {
    picked = picked.filter(runOf)
    const two = picked.map(runOf).sort((a, b) => a.time - b.time)
    compared.replaceChildren(...(two.length < 2 ? [] : [
      sideBySide(two.map(({ report, time }) => ({ title: timeOf(time), verdict: worstOf(report), prompt: report.prompt, ordinary: report.ordinary })), 'Two runs side by side'),
      button('End comparing', () => { picked = []; renderList() }),
    ]))
    if (picked.length === 1) count.textContent += '. Choose a second one to compare.'
  }

  const stop = runs.listen(() => {
    follow()
    renderList()
    renderDetails()
  })
  renderList()
  return {
    element,
    refresh: panel.refresh,
    idle: panel.idle,
    remove() {
      stop()
      panel.remove()
    },
  }
}

const timeOf = (time) => new Date(time).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit', hourCycle: 'h23' })
