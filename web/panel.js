/** The report as it stands inside a node or in the sidebar. Knows no host: what it may do there comes as ``host``. */

import { promptsFor, timeLeft } from './calibrate.js'
import { drawChart } from './chart.js'
import { shade, sideBySide } from './compare.js'
import { badge, button, make } from './dom.js'
import { drawMap, tellsParts } from './map.js'
import { acted, compared, pieces, placed } from './prompt.js'
import { asText, besideLabel, mitigationFacts, number, strength, topWord, withoutWord, wordValue } from './report.js'

const LEAST_CHART_WIDTH = 240
const CHART_HEIGHTS = [110, 240] // pixels: what there is room for in the node
const CHART_HEIGHT = 190 // where it is as high as it likes
const CHART_HINT = 'Point at the curve for its values, or use the arrow keys.'
const CHART_TEXT = 44 // its keys and its readout, before it is drawn
const PADDING = 16 // of the panel and its last line, below
const EMPTY = 'Nothing was measured yet. Queue the workflow: the verdict appears at the first step.'
/** An image has two predictions a step, an ordinary prompt one at the first step alone. */
function cost(count, steps) {
  const images = Math.max(1, Math.round(count / (2 * Math.max(1, steps))))
  const takes = images === 1 ? 'as long as about one image takes' : `as long as about ${images} images take`
  return `Runs this workflow once more and measures ${count.toLocaleString('en-GB')} ordinary prompts: ${takes}.`
}
const QUEUED = 'In the queue. The verdict comes by itself.'

/**
 * ``host``: {text(promptNode, prompt) -> {value, set(text)} or {why}, queue(), copy(text), calibrate(count) -> {why} or {},
 * sheet}; without ``text`` words only tell their values, without ``calibrate`` no calibration is offered. Returned:
 * {element, show(report, state), images(urls), refresh(), idle(), remove()}.
 */
export function createPanel(host = null) {
  let report = null, state = {}, source = null, image = 0, images = [], shownMap = true, chosenWord = -1
  let last = null // the last report on a run that has ended
  let before = null // the one before it, where only words were changed since
  let asked = null // {text, refused} of a calibration that was asked for
  let awaited = null // {promptId} of the run that is to bring a calibration
  let since = null // {at, done} of the first report on a calibration that goes on
  const element = make('section', { class: 'dejavu', 'aria-label': 'Déjà Vu report' })
  const slots = Object.fromEntries(
    ['head', 'calibration', 'change', 'chooser', 'edited', 'words', 'card', 'legend', 'chart', 'where', 'mitigation', 'details', 'actions'].map(
      (name) => [name, make('div', { class: `dejavu-${name}-slot` })],
    ),
  )
  const readout = make('p', { class: 'dejavu-readout', 'aria-hidden': 'true' })
  element.append(make('div', { class: 'dejavu-cut' }))
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

    const paint = strength(verdict, report.ordinary)
    element.classList.toggle('dejavu-calm', paint < 1)

    fill('head', [verdict.label, verdict.sentence, state.live, state.ended, state.steps], () => head(verdict))
    fill('calibration', [report.calibrating, report.lacksCalibration, state.live, asked, verdict.alpha], () => calibration(promptsFor(verdict.alpha)))
    fill('change', [verdict.label, verdict.score, verdict.pValue, image, before?.prompt, report.mitigation?.verdicts], () => change(verdict))
    fill('chooser', [report.verdicts.map((v) => [v.label, v.score]), image], chooser)
    fill('edited', [current, report.prompt, source?.why], () => edited(current))
    fill('words', [report.prompt, words, paint, edits && [...edits.changes], edits?.exact, edits?.places], () => prompt(words, paint, edits))
    if (chosenWord >= words.length || current !== state.cardText) closeCard(false)
    fill('legend', [words.length > 0, report.notes, state.live], () => legend(words))
    fill('where', [verdict.where && [...verdict.where.values], verdict.label, images, image, shownMap], () => where(verdict))
    fill('mitigation', report.mitigation, mitigation)
    fill('details', [verdict.facts, verdict.view, verdict.rawUnit, report.notes], () => details(verdict))
    fill('actions', true, actions)
    const size = chartSize()
    fill('chart', [verdict.steps, verdict.sigmas, report.band, report.ordinary, report.mitigation?.verdicts[image], size], () => chart(verdict, ...size))
  }

  function head(verdict) {
    const told = state.live && !report.calibrating ? ` Drawing: step ${state.steps}.` : state.ended ? ' The run was ended early.' : ''
    return make('p', { class: 'dejavu-verdict', role: 'status' }, badge(verdict.label), ` ${besideLabel(verdict)}.`,
      told && make('span', { class: 'dejavu-quiet' }, told))
  }

  function calibration(wanted) {
    if (report.calibrating && state.live) {
      const { done, count } = report.calibrating
      const left = since ? timeLeft(since, Date.now(), report.calibrating) : ''
      const name = 'Comparing with ordinary prompts'
      return [make('p', { class: 'dejavu-progress' }, `${name}: ${done} of ${count}. ${left}${left && '.'}`, make('progress', { value: done, max: count, 'aria-label': name }))]
    }
    if (asked) {
      return [make('p', { class: 'dejavu-edited', role: asked.refused ? 'alert' : 'status' }, asked.text), asked.refused && offer(wanted)]
    }
    return report.lacksCalibration && host?.calibrate && !state.live ? [offer(wanted), make('p', { class: 'dejavu-quiet' }, cost(wanted, state.steps))] : []
  }

  function offer(count) {
    return make('p', { class: 'dejavu-buttons' }, button('Calibrate with these settings', async () => {
      const { why, promptId } = await host.calibrate(count)
      asked = { text: why ?? QUEUED, refused: Boolean(why) }
      awaited = why ? null : { promptId }
      render()
    }, { class: 'dejavu-first' }))
  }

  /** Before and after: a mitigation of this run, or a word that was changed since the run before it. */
  function change(verdict) {
    const mitigated = report.mitigation?.verdicts
    const after = mitigated?.[Math.min(image, mitigated.length - 1)]
    if (after) return sideBySide([{ title: 'Before the mitigation', verdict }, { title: 'After it', verdict: after }], 'Before and after the mitigation')
    if (!before || verdict.score === null) return []
    const then = before.verdicts[Math.min(image, before.verdicts.length - 1)]
    return sideBySide([{ title: 'Before', verdict: then }, { title: 'After', verdict }], 'Before and after the change of words')
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

  function prompt(words, paint, edits) {
    if (!report.prompt && !words.length) return make('p', { class: 'dejavu-quiet' }, '(empty prompt)')
    const top = topWord(words)
    const shown = words.map((word, index) => wordElement(word, index, words, paint, edits, paint === 1 && index === top))
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

  function wordElement(word, index, words, paint, edits, isTop) {
    const factor = edits?.changes.get(index)
    const now = factor === undefined ? '' : factor === 0 ? ', dropped since' : `, weighed ×${factor} since`
    const value = `${wordValue(word, words)}${now}`
    const tell = () => { readout.textContent = chosenWord === index ? '' : `${word.text}: ${value}` }
    const hint = () => { readout.textContent = '' }
    const open = () => (chosenWord === index ? closeCard(true) : openCard(index))
    const one = make('span', {
      class: ['dejavu-word', isTop && 'dejavu-top', factor === 0 && 'dejavu-dropped'].filter(Boolean).join(' '),
      role: 'button', tabindex: -1, 'data-index': index, 'aria-label': `${word.text}: ${value}`, 'aria-expanded': String(index === chosenWord),
      style: shade(word.significance, paint),
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
      make('p', { class: 'dejavu-card-head' }, make('span', {}, make('strong', { dir: 'auto' }, word.text), ` ${wordValue(word, words)}.`),
        button('×', () => closeCard(true), { class: 'dejavu-close', 'aria-label': 'Close', title: 'Close' })),
      make('p', {}, withoutWord(word, verdict, report.ordinary)),
      wordActions(words, index),
    )
    slots.card.replaceChildren(card)
    readout.textContent = ''
    wordAt(index)?.setAttribute('aria-expanded', 'true')
    const first = card.querySelector('.dejavu-buttons button:not(:disabled)') ?? card.querySelector('button')
    first.focus({ preventScroll: true })
    card.scrollIntoView?.({ block: 'nearest' })
  }

  function wordActions(words, index) {
    if (!host?.text) return null
    const why = source ? source.why : 'The prompt’s text is not known, so it cannot be changed here.'
    if (why) return make('p', { class: 'dejavu-quiet' }, why)
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
    return make('p', { class: 'dejavu-buttons' },
      act('drop', 'Drop'), factor === 0 ? '' : act('weaken', 'Weaken ×0.8'), act('restore', 'Restore'),
      button('Queue again', () => host.queue()))
  }

  function closeCard(toWord) {
    if (chosenWord < 0) return
    const word = wordAt(chosenWord)
    chosenWord = -1
    slots.card.replaceChildren()
    readout.textContent = ''
    word?.setAttribute('aria-expanded', 'false')
    if (toWord) word?.focus({ preventScroll: true })
  }

  function legend(words) {
    if (!words.length) {
      return make('p', { class: 'dejavu-quiet' }, report.notes[0] ?? (state.live ? '' : 'To see which words matter, set “explain” to “always” in the Monitor.'))
    }
    return make('p', { class: 'dejavu-quiet dejavu-legend' }, 'Darker words count more. Click one to see what it does.')
  }

  /** [width, height] of the curve: the width of the panel, and what height is left there beside all else. */
  function chartSize() {
    const width = Math.max(LEAST_CHART_WIDTH, Math.round(slots.chart.clientWidth || 400))
    if (element.closest('.dejavu-sidebar')) return [width, CHART_HEIGHT]
    const drawn = slots.chart.querySelector('svg')?.clientHeight ?? -CHART_TEXT
    const others = slots.actions.offsetTop + slots.actions.offsetHeight + PADDING - drawn
    const [least, most] = CHART_HEIGHTS
    return [width, Math.round(Math.min(most, Math.max(least, element.clientHeight - others)))]
  }

  function chart(verdict, width, height) {
    if (!verdict.steps.length) return []
    const other = report.mitigation?.verdicts[Math.min(image, report.mitigation.verdicts.length - 1)]
    const after = other?.steps.length ? other : null
    const { band, ordinary } = report
    const told = make('output', { class: 'dejavu-readout' }, CHART_HINT)
    const svg = drawChart({ curve: verdict, after, band, ordinary, width, height, tell: (text) => { told.textContent = text || CHART_HINT } })
    const key = (kind, name, title = null) => make('span', { class: 'dejavu-key', title }, make('span', { class: `dejavu-sample dejavu-sample-${kind}`, 'aria-hidden': 'true' }), name)
    const banded = svg.querySelector('.dejavu-band'), marked = svg.querySelector('.dejavu-ordinary')
    return make('figure', {}, make('figcaption', { class: 'dejavu-quiet dejavu-keys' },
      key('measured', 'this prompt'), after && key('after', 'after the mitigation'),
      banded && key('band', 'ordinary prompts', '90 of 100 ordinary prompts lie in the band; half of them lie below the dashed line'),
      marked && key('median', 'ordinary prompts', 'Half of the ordinary prompts lie below the dashed mark, 95 of 100 below the other one')), svg, told)
  }

  /** Where the prompt shaped the image: only where it was flagged and the map says something. */
  function where(verdict) {
    if (!verdict.where || verdict.label !== 'Flagged' || !tellsParts(verdict.where)) return []
    const { width, height } = verdict.where
    const canvas = make('canvas', { class: 'dejavu-map', role: 'img', 'aria-label': 'Where the prompt shaped this image; brighter is more' })
    drawMap(canvas, verdict.where)
    const url = images[image] ?? null
    const shown = url && make('img', { src: url, alt: `Image ${image + 1} of this run`, onerror: (event) => event.target.remove() })
    if (url) canvas.classList.add('dejavu-over')
    canvas.hidden = Boolean(url) && !shownMap
    const toggle = url && button('Show where', () => { shownMap = !shownMap; render() }, { 'aria-pressed': String(shownMap) })
    return make('figure', { class: 'dejavu-where' },
      make('div', { class: 'dejavu-image', style: `aspect-ratio:${width}/${height}` }, shown, canvas),
      make('figcaption', { class: 'dejavu-quiet' }, make('p', {}, 'Where the prompt shaped this image at the last step: brighter is more.'), toggle))
  }

  function mitigation() {
    if (!report.mitigation) return []
    return make('section', { class: 'dejavu-mitigation', 'aria-label': 'Mitigation' },
      make('h4', {}, 'Mitigation'), factList(mitigationFacts(report)))
  }

  function details(verdict) {
    const facts = [...verdict.facts]
    if (verdict.words.length && verdict.view) facts.push(['Words', verdict.rawUnit ? `${verdict.view} (${verdict.rawUnit})` : verdict.view])
    if (!facts.length && !report.notes.length) return []
    return make('details', {}, make('summary', {}, 'Details'), factList(facts),
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
    /**
     * ``next`` as read by readReport, or null; ``document`` is what is copied as JSON, ``live`` while sampling, ``begins``
     * at the first report on a run: its verdict is brought into sight; ``ended`` of one that was ended early; ``promptId``
     * of the host’s name for it.
     */
    show(next, { document = null, live = false, begins = false, ended = false, promptId = undefined } = {}) {
      if (next?.prompt !== report?.prompt) closeCard(false)
      if (!next) before = last = null
      else if (last && last.prompt !== next.prompt) before = changedWords(last, next) ? last : null
      if (!live) last = next
      report = next
      const ours = !awaited || awaited.promptId === promptId
      if (ours) asked = null
      if (!live && awaited && ours) {
        awaited = null
        if (next?.lacksCalibration) asked = { text: `There is still nothing to compare with${next.notes.length ? `: ${next.notes.at(-1).replace(/\.$/, '')}` : ''}.`, refused: true }
      }
      since = next?.calibrating ? (since ?? { at: Date.now(), done: next.calibrating.done }) : null
      state = { ...state, document, live, ended, steps: next ? Math.max(...next.verdicts.map((v) => v.steps.length)) : 0 }
      render()
      if (begins) element.scrollTop = 0
    },
    images(urls) {
      images = urls
      render()
    },
    /** The host's queue is empty: what was live was ended early, and what was asked for is not to come. */
    idle() {
      if (asked && !asked.refused) asked = null
      awaited = null
      if (state.live) {
        report = { ...report, calibrating: null }
        state = { ...state, live: false, ended: true }
      }
      if (report) render()
    },
    /** Look again at the text in the node. */
    refresh: render,
    remove: () => observer.disconnect(),
  }
}

/** Whether only words were dropped or weakened between two reports' prompts. */
function changedWords(then, now) {
  const same = (one, other) => compared(one.prompt, placed(one.prompt, one.verdicts[0].words), other.prompt)
  return then.prompt !== now.prompt && Boolean(then.prompt && now.prompt) && (same(then, now).exact || same(now, then).exact)
}
