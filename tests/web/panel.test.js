import { beforeEach, describe, expect, it, vi } from 'vitest'
import { createPanel } from '../../web/panel.js'
import { readReport } from '../../web/report.js'
import { document as report, NASTY, verdict } from './fixture.js'

let host, text, panel
const $ = (selector) => panel.element.querySelector(selector)
const word = (index) => $(`[data-index="${index}"]`)
const buttonNamed = (name) => [...panel.element.querySelectorAll('button')].find((b) => b.textContent === name)
const show = (given, more) => panel.show(readReport(given), { document: given, ...more })

beforeEach(() => {
  document.body.replaceChildren()
  text = 'Study Of A Black Car By Moxgaen'
  host = { text: () => ({ value: text, set: (next) => { text = next; panel.refresh() } }), queue: vi.fn(), copy: vi.fn(async () => true) }
  panel = createPanel(host)
  document.body.append(panel.element)
})

it('says what to do before there is anything', () => expect(panel.element.textContent).toContain('Queue the workflow'))

it('says the verdict first, then the prompt', () => {
  show(report())
  const shown = panel.element.textContent
  expect(shown.indexOf('Flagged Likely memorised')).toBeGreaterThanOrEqual(0)
  expect(shown.indexOf('Likely memorised')).toBeLessThan(shown.indexOf('Study'))
  expect($('[role="status"]').textContent).toContain('Likely memorised')
})

it.each(Object.entries(NASTY))('shows a prompt literally: %s', (_, prompt) => {
  text = prompt
  show(report(prompt))
  expect($('.dejavu-words').textContent).toBe(prompt)
  expect(panel.element.querySelector('script, b, .dejavu-words img')).toBeNull()
  expect(window.hit).toBeUndefined()
})

describe('words', () => {
  beforeEach(() => show(report()))

  it('tell their value on hover and on focus', () => {
    word(3).dispatchEvent(new Event('pointerenter'))
    expect($('.dejavu-readout').textContent).toBe('Black: significance 0.57, 1.14 (gradient times loss)')
    word(6).focus()
    expect($('.dejavu-readout').textContent).toContain('Moxgaen: significance 1.00')
  })

  it('are one stop in the focus order, and arrow keys move among them', () => {
    expect(panel.element.querySelectorAll('.dejavu-word[tabindex="0"]').length).toBe(1)
    word(0).focus()
    word(0).dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }))
    expect(document.activeElement).toBe(word(1))
    word(1).dispatchEvent(new KeyboardEvent('keydown', { key: 'End', bubbles: true }))
    expect(document.activeElement).toBe(word(6))
    expect(panel.element.querySelectorAll('.dejavu-word[tabindex="0"]').length).toBe(1)
  })

  it('open with Enter and close with Escape, the focus back on the word', () => {
    word(6).focus()
    word(6).dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', bubbles: true }))
    expect($('[role="dialog"]').textContent).toContain('would score 0.5, instead of 2.5')
    expect(document.activeElement.textContent).toBe('Drop')
    document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', bubbles: true }))
    expect($('[role="dialog"]')).toBeNull()
    expect(document.activeElement).toBe(word(6))
  })

  it('are dropped, weakened and restored in the text', () => {
    word(6).click()
    buttonNamed('Drop').click()
    expect(text).toBe('Study Of A Black Car By')
    expect(word(6).classList).toContain('dejavu-dropped')
    expect(panel.element.textContent).toContain('differs from this run’s prompt')
    buttonNamed('Restore').click()
    expect(text).toBe('Study Of A Black Car By Moxgaen')
    buttonNamed('Weaken ×0.8').click()
    expect(text).toBe('Study Of A Black Car By (Moxgaen:0.8)')
    expect(word(6).textContent).toBe('Moxgaen×0.8')
    buttonNamed('Restore the whole prompt').click()
    expect(text).toBe('Study Of A Black Car By Moxgaen')
  })

  it('say why where the text cannot be changed', () => {
    host.text = () => ({ why: 'It is put together by other nodes.' })
    panel.refresh()
    word(1).click()
    expect($('[role="dialog"]').textContent).toContain('put together by other nodes')
    expect(buttonNamed('Drop')).toBeUndefined()
  })

  it('follow a text that is typed', () => {
    text = 'a Black dog'
    panel.refresh()
    expect(word(3).classList).not.toContain('dejavu-dropped')
    expect(word(4).classList).toContain('dejavu-dropped')
  })

  it('keep the element while nothing of theirs changes', () => {
    const before = word(0)
    show(report(undefined, { band: [] }), { live: true })
    expect(word(0)).toBe(before)
  })
})

it('shows token positions as chips, and says why', () => {
  const words = [{ text: 'token 5', start: 0, end: 0, raw: 1, significance: 1, score_without: null }]
  show(report('', { verdicts: [verdict('', { words })], notes: ['The text of the prompt is not known.'] }))
  expect($('.dejavu-chips').textContent.trim()).toBe('token 5')
  word(0).click()
  expect($('[role="dialog"]').textContent).toContain('not known')
  expect(panel.element.textContent).toContain('The text of the prompt is not known.')
})

it('chooses among the images of a batch', () => {
  const other = verdict('a b', { label: 'Not flagged', sentence: 'Nothing unusual, p = 0.4', score: 0.3 })
  show(report('a b', { verdicts: [verdict('a b'), other] }))
  const select = $('select')
  expect([...select.options].map((o) => o.textContent)).toEqual(['1 of 2: Flagged, score 2.5', '2 of 2: Not flagged, score 0.3'])
  select.selectedIndex = 1
  select.dispatchEvent(new Event('change'))
  expect($('.dejavu-verdict').textContent).toContain('Nothing unusual')
})

it('grows the curve while it is live', () => {
  const live = (count) => report('a', { verdicts: [verdict('a', { score_per_step: [2, 1, 1].slice(0, count), sigmas: [9, 5, 2].slice(0, count) })] })
  show(live(1), { live: true })
  expect(panel.element.querySelectorAll('circle').length).toBe(1)
  expect(panel.element.textContent).toContain('1 evaluated so far')
  show(live(3))
  expect(panel.element.querySelectorAll('circle').length).toBe(3)
  expect(panel.element.textContent).not.toContain('so far')
})

it('lays the map over the image', () => {
  show(report())
  expect($('canvas')).not.toBeNull()
  expect($('figure img')).toBeNull()
  panel.images(['data:image/png;base64,'])
  expect($('figure img').getAttribute('src')).toBe('data:image/png;base64,')
  buttonNamed('Map').click()
  expect($('canvas').hidden).toBe(true)
  expect(buttonNamed('Map').getAttribute('aria-pressed')).toBe('false')
})

it('shows what was sampled instead', () => {
  const mitigation = { score_before: 2.5, score_after: 0.4, prompt: 'x', verdicts: [verdict('x', { label: 'Not flagged', score_per_step: [0.4, 0.3] })] }
  show(report('x', { mitigation }))
  expect($('.dejavu-mitigation').textContent).toContain('2.5 before, 0.4 after')
  expect(panel.element.querySelectorAll('rect.dejavu-after').length).toBe(2)
})

it('copies as text and as JSON', async () => {
  show(report())
  buttonNamed('Copy as text').click()
  buttonNamed('Copy as JSON').click()
  await Promise.resolve()
  expect(host.copy.mock.calls[0][0]).toContain('Prompt: Study Of')
  expect(JSON.parse(host.copy.mock.calls[1][0])).toEqual(report())
})

it('queues again', () => {
  show(report())
  buttonNamed('Queue again').click()
  expect(host.queue).toHaveBeenCalledOnce()
})
