/** The report as it stands inside a node or in the sidebar. Knows no host: what it may do there comes as ``host``. */

import { drawChart } from './chart.js'
import { badge, button, make } from './dom.js'
import { acted, compared, pieces, placed } from './prompt.js'
import { asText, besideLabel, mapPixels, mitigationFacts, number, topWord, withoutWord, wordValue } from './report.js'

const LEAST_CHART_WIDTH = 260
const HINT = 'Point at a word for its value; click it to see what the score would be without it.'
const CHART_HINT = 'Point at the curve for its values, or use the arrow keys.'
const EMPTY = 'Nothing was measured yet. Queue the workflow: the verdict appears at the first step.'

/**
 * ``host``: {text(promptNode, prompt) -> {value, set(text)} or {why}, queue(), copy(text), sheet}; without ``text``
 * words only tell their values. Returned: {element, show(report, state), images(urls), refresh(), remove()}.
 */
export function createPanel(host = null) {
  let report = null, state = {}, source = null, image = 0, images = [], shownMap = true, chosenWord = -1
  const element = make('section', { class: 'dejavu', 'aria-label': 'Déjà Vu report' })
  const slots = Object.fromEntries(
    ['head', 'chooser', 'edited', 'words', 'card', 'legend', 'mitigation', 'chart', 'where', 'details', 'actions'].map(
      (name) => [name, make('div', { class: `dejavu-${name}-slot` })],
    ),
  )
  const readout = make('p', { class: 'dejavu-readout', 'aria-hidden': 'true' })
  // The sheet comes with the panel: the page's head is shared with other packs.
  if (host?.sheet) element.append(make('link', { rel: 'stylesheet', href: host.sheet }))
  element.append(...Object.entries(slots).flatMap(([name, slot]) => (name === 'words' ? [slot, readout] : [slot])))
  const keys = new Map()

  /** Fill a slot again only when what it shows has changed, so that focus and selection stay. */
  function fill(name, key, contents) {
    const text = JSON.stringify(key)
    if (keys.get(name) === text) return
    keys.set(name, text)
    slots[name].replaceChildren(...[contents()].flat().filter(Boolean))
  }

  function render() {
    if (!report) {
      fill('head', null, () => make('p', { class: 'dejavu-empty' }, EMPTY))
      for (const name of Object.keys(slots)) if (name !== 'head') fill(name, null, () => [])
      readout.textContent = ''
      return
    }
    image = Math.min(image, report.verdicts.length - 1)
    const verdict = report.verdicts[image]
    const words = placed(report.prompt, verdict.words)
    source = (report.prompt && host?.text?.(report.promptNode, report.prompt)) || null
    const current = source?.value ?? null
    const edits = current === null ? null : compared(report.prompt, words, current)

    fill('head', [verdict.label, verdict.sentence, state], () => head(verdict))
    fill('chooser', [report.verdicts.map((v) => [v.label, v.score]), image], chooser)
    fill('edited', [current, report.prompt, source?.why], () => edited(current))
    fill('words', [report.prompt, words, edits && [...edits.changes], edits?.exact, edits?.places], () => prompt(verdict, words, edits))
    if (!report.verdicts[image].words.length) readout.textContent = ''
    else if (!readout.textContent) readout.textContent = HINT
    if (chosenWord >= words.length || current !== state.cardText) closeCard(false)
    fill('legend', [words.length > 0, verdict.view, topWord(words), report.notes], () => legend(verdict, words))
    fill('chart', [verdict.steps, verdict.sigmas, report.band, report.ordinary, report.mitigation?.verdicts[image], chartWidth()], () => chart(verdict))
    fill('where', [verdict.where && [...verdict.where.values], images, image, shownMap], () => where(verdict))
    fill('mitigation', report.mitigation, mitigation)
    fill('details', [verdict.facts, report.notes], () => details(verdict))
    fill('actions', true, actions)
  }

  function head(verdict) {
    const progress = state.live ? make('span', { class: 'dejavu-quiet' }, ` Sampling: ${state.steps} evaluated so far.`) : ''
    return make('p', { class: 'dejavu-verdict', role: 'status' }, badge(verdict.label), ` ${besideLabel(verdict)}.`, progress)
  }

  function chooser() {
    if (report.verdicts.length < 2) return []
    const select = make(
      'select',
      { onchange: () => { image = select.selectedIndex; closeCard(false); render() } },
      report.verdicts.map((v, i) => make('option', { selected: i === image }, `${i + 1} of ${report.verdicts.length}: ${v.label}, score ${number(v.score)}`)),
    )
    return make('label', { class: 'dejavu-chooser' }, 'Image ', select)
  }

  function edited(current) {
    if (current === null || current === report.prompt) return []
    const back = button('Restore the whole prompt', () => { source.set(report.prompt); render() })
    return make('p', { class: 'dejavu-edited' }, 'The text in the node differs from this run’s prompt. ', back)
  }

  function prompt(verdict, words, edits) {
    if (!report.prompt && !words.length) return make('p', { class: 'dejavu-quiet' }, '(empty prompt)')
    const top = topWord(words)
    const shown = words.map((word, index) => wordElement(word, index, verdict, edits, index === top))
    const placedOnes = words.some((word) => word.start !== null)
    const parts = placedOnes
      ? pieces(report.prompt, words).map((piece) => (piece.index === undefined ? piece.text : shown[piece.index]))
      : [report.prompt, ...shown.flatMap((one) => [' ', one])]
    const list = shown.filter((one) => parts.includes(one))
    if (list.length) list[0].tabIndex = 0
    const box = make('div', {
      class: `dejavu-words${placedOnes ? '' : ' dejavu-chips'}`, dir: 'auto', role: 'group',
      'aria-label': 'Prompt: arrow keys move from word to word, Enter opens one',
      onkeydown: (event) => moveAmong(list, event),
    }, parts)
    return box
  }

  function wordElement(word, index, verdict, edits, isTop) {
    const factor = edits?.changes.get(index)
    const now = factor === undefined ? '' : factor === 0 ? ', dropped since' : `, weighed ×${factor} since`
    const value = `${wordValue(word, verdict)}${now}`
    const tell = () => { readout.textContent = chosenWord === index ? '' : `${word.text}: ${value}` }
    const hint = () => { readout.textContent = chosenWord < 0 ? HINT : '' }
    const open = () => (chosenWord === index ? closeCard(true) : openCard(index))
    const level = word.significance
    const one = make('span', {
      class: ['dejavu-word', isTop && 'dejavu-top', factor === 0 && 'dejavu-dropped'].filter(Boolean).join(' '),
      role: 'button', tabindex: -1, 'data-index': index, 'aria-label': `${word.text}: ${value}`, 'aria-expanded': String(index === chosenWord),
      style: shade(level),
      onpointerenter: tell, onpointerleave: hint, onfocus: tell, onblur: hint, onclick: open,
      onkeydown: (event) => {
        if (event.key !== 'Enter' && event.key !== ' ') return
        event.preventDefault()
        event.stopPropagation()
        open()
      },
    }, word.start === null ? word.text : report.prompt.slice(word.start, word.end))
    if (factor) one.append(make('sub', {}, `×${factor}`))
    return one
  }

  function moveAmong(list, event) {
    const at = list.indexOf(event.target)
    const turned = getComputedStyle(slots.words.firstElementChild).direction === 'rtl' ? -1 : 1
    const to = { ArrowRight: at + turned, ArrowLeft: at - turned, Home: 0, End: list.length - 1 }[event.key]
    if (at < 0 || to === undefined) return
    event.preventDefault()
    event.stopPropagation()
    const next = list[Math.min(list.length - 1, Math.max(0, to))]
    list[at].tabIndex = -1
    next.tabIndex = 0
    next.focus()
  }

  const wordAt = (index) => slots.words.querySelector(`[data-index="${index}"]`)

  function openCard(index) {
    closeCard(false)
    chosenWord = index
    state.cardText = source?.value ?? null
    const verdict = report.verdicts[image]
    const words = placed(report.prompt, verdict.words)
    const word = words[index]
    const close = (event) => {
      if (event.key !== 'Escape') return
      event.stopPropagation()
      closeCard(true)
    }
    const card = make(
      'div',
      { class: 'dejavu-card', role: 'dialog', 'aria-label': `The word ${word.text}`, onkeydown: close },
      make('p', {}, make('strong', { dir: 'auto' }, word.text), `: ${wordValue(word, verdict)}.`),
      make('p', {}, withoutWord(word, verdict, report.ordinary)),
      ...wordActions(words, index),
    )
    slots.card.replaceChildren(card)
    readout.textContent = ''
    wordAt(index)?.setAttribute('aria-expanded', 'true')
    card.querySelector('button:not(:disabled)')?.focus({ preventScroll: true })
    card.scrollIntoView?.({ block: 'nearest' })
  }

  function wordActions(words, index) {
    const closer = button('Close', () => closeCard(true))
    if (!host?.text) return [make('p', { class: 'dejavu-buttons' }, closer)]
    const why = source ? source.why : 'The prompt’s text is not known, so it cannot be changed here.'
    if (why) return [make('p', { class: 'dejavu-quiet' }, why), make('p', { class: 'dejavu-buttons' }, closer)]
    const factor = compared(report.prompt, words, source.value).changes.get(index)
    const act = (name, label) => {
      const next = acted(name, report.prompt, words, source.value, index)
      const run = () => {
        source.set(next)
        render()
        openCard(index)
      }
      return button(label, run, { disabled: next === null || next === source.value })
    }
    return [
      make('p', { class: 'dejavu-buttons' },
        act('drop', 'Drop'), factor === 0 ? '' : act('weaken', 'Weaken ×0.8'), act('restore', 'Restore'),
        button('Queue again', () => host.queue()), closer),
    ]
  }

  function closeCard(toWord) {
    if (chosenWord < 0) return
    const word = wordAt(chosenWord)
    chosenWord = -1
    slots.card.replaceChildren()
    readout.textContent = HINT
    word?.setAttribute('aria-expanded', 'false')
    if (toWord) word?.focus({ preventScroll: true })
  }

  function legend(verdict, words) {
    if (!words.length) {
      return make('p', { class: 'dejavu-quiet' }, report.notes[0] ?? 'The words were not looked at: the monitor’s “explain” asks for them.')
    }
    const scale = [0, 0.25, 0.5, 0.75, 1].map((s) => make('span', { class: 'dejavu-swatch', style: shade(s) }, String(s)))
    const top = words[topWord(words)]
    return make('p', { class: 'dejavu-quiet dejavu-legend' },
      `Significance${verdict.view && ` by ${verdict.view}`}: `, scale, ' (darker, thicker line: more; bold: most).',
      top ? [' Highest: ', make('bdi', {}, top.text), ` ${top.significance.toFixed(2)}.`] : '')
  }

  const chartWidth = () => Math.max(LEAST_CHART_WIDTH, Math.round(slots.chart.clientWidth || 400))

  function chart(verdict) {
    if (!verdict.steps.length) return []
    const other = report.mitigation?.verdicts[Math.min(image, report.mitigation.verdicts.length - 1)]
    const after = other?.steps.length ? other : null
    const { band, ordinary } = report
    const told = make('output', { class: 'dejavu-readout' }, CHART_HINT)
    const svg = drawChart({ curve: verdict, after, band, ordinary, width: chartWidth(), tell: (text) => { told.textContent = text || CHART_HINT } })
    const key = (kind, name) => make('span', { class: 'dejavu-key' }, make('span', { class: `dejavu-sample dejavu-sample-${kind}`, 'aria-hidden': 'true' }), name)
    const banded = svg.querySelector('.dejavu-band'), marked = svg.querySelector('.dejavu-ordinary')
    return make('figure', {}, make('figcaption', { class: 'dejavu-quiet' },
      key('measured', 'this prompt'), after && key('after', 'after mitigation'),
      banded && key('band', 'ordinary prompts, 5 to 95%'), banded && key('median', 'their median'),
      marked && key('median', 'ordinary prompts: median (dashed) to 95%')), svg, told)
  }

  function where(verdict) {
    if (!verdict.where) return []
    const { width, height } = verdict.where
    const canvas = make('canvas', { width, height, class: 'dejavu-map', role: 'img', 'aria-label': 'Where in the image the prompt acts; brighter is more' })
    canvas.getContext('2d')?.putImageData(new ImageData(mapPixels(verdict.where), width, height), 0, 0)
    const url = images[image] ?? null
    const shown = url && make('img', { src: url, alt: `Image ${image + 1} of this run`, onerror: (event) => event.target.remove() })
    if (url) canvas.classList.add('dejavu-over')
    canvas.hidden = Boolean(url) && !shownMap
    const toggle = url && button('Map', () => { shownMap = !shownMap; render() }, { 'aria-pressed': String(shownMap) })
    return make('figure', { class: 'dejavu-where' },
      make('div', { class: 'dejavu-image', style: `aspect-ratio:${width}/${height}` }, shown, canvas),
      make('figcaption', { class: 'dejavu-quiet' }, make('p', {}, 'Where the prompt acts: brighter is more.'), toggle))
  }

  function mitigation() {
    if (!report.mitigation) return []
    return make('section', { class: 'dejavu-mitigation', 'aria-label': 'Mitigation' },
      make('h4', {}, 'Mitigation'), factList(mitigationFacts(report)),
      report.mitigation.verdicts.slice(0, 1).map((v) => make('p', {}, badge(v.label), ` after it: ${besideLabel(v)}.`)))
  }

  function details(verdict) {
    if (!verdict.facts.length && !report.notes.length) return []
    return make('details', {}, make('summary', {}, 'Details'), factList(verdict.facts),
      report.notes.length ? make('ul', {}, report.notes.map((note) => make('li', { dir: 'auto' }, note))) : null)
  }

  function factList(facts) {
    return make('dl', {}, facts.flatMap(([name, value]) => [make('dt', {}, name), make('dd', { dir: 'auto' }, value)]))
  }

  function actions() {
    if (!host) return []
    const told = make('span', { class: 'dejavu-quiet', role: 'status' })
    const copied = (what, text) => async () => {
      const done = await host.copy(text())
      told.textContent = done ? `${what} copied.` : 'The browser did not allow copying.'
    }
    return make('p', { class: 'dejavu-buttons' },
      button('Copy as text', copied('Text', () => asText(report))),
      button('Copy as JSON', copied('JSON', () => JSON.stringify(state.document, null, 2))),
      button('Queue again', () => host.queue()), told)
  }

  element.addEventListener('keydown', (event) => {
    // The host would delete the node that was selected by the click.
    if (event.key === 'Delete' || event.key === 'Backspace') event.stopPropagation()
  })
  element.addEventListener('copy', (event) => {
    if (String(getSelection())) event.stopPropagation()
  })
  const observer = new ResizeObserver(() => requestAnimationFrame(() => report && render()))
  observer.observe(element)
  render()

  return {
    element,
    /** ``next`` as read by readReport, or null; ``document`` is what is copied as JSON, ``live`` while sampling. */
    show(next, { document = null, live = false } = {}) {
      if (next?.prompt !== report?.prompt) closeCard(false)
      report = next
      state = { ...state, document, live, steps: next ? Math.max(...next.verdicts.map((v) => v.steps.length)) : 0 }
      render()
    },
    images(urls) {
      images = urls
      render()
    },
    /** Look again at the text in the node. */
    refresh: render,
    remove: () => observer.disconnect(),
  }
}

function shade(significance) {
  return `--dejavu-level:${significance.toFixed(2)};border-bottom-width:${Math.round(4 * significance)}px`
}
