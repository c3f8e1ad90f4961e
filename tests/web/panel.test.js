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
    expect($('.dejavu-readout').textContent).toBe('Black: counts 57% as much as “Moxgaen”')
    word(6).focus()
    expect($('.dejavu-readout').textContent).toBe('Moxgaen: counts most')
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
    expect($('[role="dialog"]').textContent).toContain('Moxgaen counts most.×Without it the first step would score about 0.5 instead of 2.5; ordinary prompts score about 0.3.')
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
  expect(panel.element.textContent).toContain('Drawing: step 1')
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
  buttonNamed('Show where').click()
  expect($('canvas').hidden).toBe(true)
  expect(buttonNamed('Show where').getAttribute('aria-pressed')).toBe('false')
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

it('shows no map where nothing is flagged, or where it is noise', () => {
  show(report('a', { verdicts: [verdict('a', { label: 'Not flagged' })] }))
  expect($('canvas')).toBeNull()
  const where = { width: 4, height: 4, values: btoa('\x00\xff\xff\x00\xff\x00\x00\xff'.repeat(2)) }
  show(report('a', { verdicts: [verdict('a', { where })] }))
  expect($('canvas')).toBeNull()
})

it('paints words in alarm only where flagged', () => {
  const levels = () => [...panel.element.querySelectorAll('.dejavu-word')].map((w) => Number(/level:([\d.]+)/.exec(w.getAttribute('style'))[1]))
  show(report('a b'))
  expect(levels()).toEqual([0.5, 1])
  expect(panel.element.querySelectorAll('.dejavu-top').length).toBe(1)
  show(report('a b', { verdicts: [verdict('a b', { label: 'Not flagged', score: 0.3 })] }))
  expect(Math.max(...levels())).toBeLessThan(0.2)
  expect($('.dejavu-top')).toBeNull()
  expect(panel.element.classList).toContain('dejavu-calm')
})

describe('a calibration', () => {
  const lacking = (more = {}) => report('a', { verdicts: [verdict('a', { label: 'No verdict', sentence: 'No verdict yet: the score is 2.5', p_value: null })], lacks_calibration: true, ...more })
  const begin = async (answer) => {
    host.calibrate = vi.fn(async () => answer)
    show(lacking())
    buttonNamed('Calibrate with these settings').click()
    await Promise.resolve()
    await Promise.resolve()
  }

  it('is offered only where one is lacking, and not while sampling', () => {
    host.calibrate = vi.fn()
    show(report())
    expect(buttonNamed('Calibrate with these settings')).toBeUndefined()
    show(lacking(), { live: true })
    expect(buttonNamed('Calibrate with these settings')).toBeUndefined()
    show(lacking())
    expect(buttonNamed('Calibrate with these settings')).toBeDefined()
    expect(panel.element.textContent).toContain('100 ordinary prompts')
  })

  it('is asked for once', async () => {
    await begin({})
    expect(host.calibrate).toHaveBeenCalledOnce()
    expect(buttonNamed('Calibrate with these settings')).toBeUndefined()
    expect(panel.element.textContent).toContain('In the queue')
    panel.idle()
    expect(buttonNamed('Calibrate with these settings')).toBeDefined()
  })

  it('says the one thing to do where it cannot be done', async () => {
    await begin({ why: 'Link CLIP to the Monitor.' })
    expect($('[role="alert"]').textContent).toBe('Link CLIP to the Monitor.')
    expect(buttonNamed('Calibrate with these settings')).toBeDefined()
  })

  it('shows how far it is, the time left, and then the verdict', () => {
    vi.useFakeTimers({ now: 0 })
    host.calibrate = vi.fn()
    const measuring = (done) => show(lacking({ lacks_calibration: false, calibrating: { done, count: 100 } }), { live: true })
    measuring(0)
    expect($('.dejavu-progress').textContent).toBe('Comparing with ordinary prompts: 0 of 100. ')
    vi.setSystemTime(34_000)
    measuring(34)
    expect($('.dejavu-progress').textContent).toBe('Comparing with ordinary prompts: 34 of 100. About a minute left.')
    expect([$('progress').value, $('progress').max]).toEqual([34, 100])
    show(report('a'))
    expect($('progress')).toBeNull()
    expect($('.dejavu-verdict').textContent).toContain('Likely memorised')
    vi.useRealTimers()
  })

  it('that did not come about says why', async () => {
    await begin({})
    show(lacking({ notes: ['ordinary prompts are measured from noise, and this run begins with an image'] }), { live: true })
    show(lacking({ notes: ['ordinary prompts are measured from noise, and this run begins with an image'] }))
    expect($('[role="alert"]').textContent).toBe('There is still nothing to compare with: ordinary prompts are measured from noise, and this run begins with an image.')
    show(lacking())
    expect($('[role="alert"]')).toBeNull()
  })

  it('that the host has ended leaves nothing behind', () => {
    host.calibrate = vi.fn()
    show(lacking({ calibrating: { done: 3, count: 100 } }), { live: true })
    panel.idle()
    expect($('progress')).toBeNull()
    expect(panel.element.textContent).toContain('The run was ended early.')
    expect(buttonNamed('Calibrate with these settings')).toBeDefined()
  })
})

describe('before and after', () => {
  const table = () => [...panel.element.querySelectorAll('.dejavu-compare tr')].map((row) => [...row.children].slice(1).map((cell) => cell.textContent))
  const calm = (prompt) => report(prompt, { verdicts: [verdict(prompt, { label: 'Not flagged', sentence: 'Nothing unusual', score: 0.3, p_value: 0.4 })] })

  it('stand side by side once a word was dropped', () => {
    show(report('a red cat'))
    expect($('.dejavu-compare')).toBeNull()
    show(calm('a cat'), { live: true })
    show(calm('a cat'))
    expect(table()).toEqual([['Before', 'After'], ['▲ Flagged', '✓ Not flagged'], ['2.5', '0.3'], ['≤ 0.001', '0.4']])
    show(calm('a cat'))
    expect(table()[2]).toEqual(['2.5', '0.3'])
    show(report('a red cat'))
    expect(table()[2]).toEqual(['0.3', '2.5'])
  })

  it('are no matter of another prompt', () => {
    show(report('a red cat'))
    show(calm('two boats at sea'))
    expect($('.dejavu-compare')).toBeNull()
  })

  it('stand side by side where a run was mitigated', () => {
    const mitigation = { score_before: 2.5, score_after: 0.4, prompt: 'x', verdicts: [verdict('x', { label: 'Not flagged', score: 0.4, p_value: 0.5 })] }
    show(report('x', { mitigation }))
    expect(table()).toEqual([['Before the mitigation', 'After it'], ['▲ Flagged', '✓ Not flagged'], ['2.5', '0.4'], ['≤ 0.001', '0.5']])
  })
})

it('brings the verdict of a run that begins into sight', () => {
  show(report())
  panel.element.scrollTop = 300
  show(report(), { live: true })
  expect(panel.element.scrollTop).toBe(300)
  show(report(), { live: true, begins: true })
  expect(panel.element.scrollTop).toBe(0)
})
