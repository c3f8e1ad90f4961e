import { beforeEach, describe, expect, it, vi } from 'vitest'
import { readReport } from '../../web/report.js'
import { createRuns, filtered, labelOf, worstOf } from '../../web/runs.js'
import { createSidebar } from '../../web/sidebar.js'
import { document as report, verdict } from './fixture.js'

const run = (key, prompt = 'a cat', changes = {}) => {
  const document = report(prompt, changes)
  return { key, promptId: key, monitor: '5', report: readReport(document), document, finished: true }
}
const calm = { verdicts: [verdict('x', { label: 'Not flagged', sentence: 'Nothing unusual', score: 0.2 })] }

it('keeps the newest runs only', () => {
  const runs = createRuns(2)
  for (const key of ['a', 'b', 'c']) runs.put(run(key))
  expect(runs.all.map((r) => r.key)).toEqual(['c', 'b'])
  runs.keep(1)
  expect(runs.all.map((r) => r.key)).toEqual(['c'])
})

it('brings a run up to date in its place, with its images and its time', () => {
  const runs = createRuns(9), listener = vi.fn()
  runs.put({ ...run('a'), finished: false }, 1000)
  runs.put(run('b'), 2000)
  const stop = runs.listen(listener)
  runs.imagesFor('a', ['p.png'])
  runs.put(run('a'), 3000)
  expect(runs.all.map((r) => [r.key, r.time, r.finished, r.images])).toEqual([['b', 2000, true, []], ['a', 1000, true, ['p.png']]])
  stop()
  runs.put(run('c'))
  expect(listener).toHaveBeenCalledTimes(2)
})

it('filters by words and by verdict', () => {
  const all = [run('a', 'A Black Cat'), run('b', 'a red boat', calm)]
  expect(filtered(all, 'cat black', '').map((r) => r.key)).toEqual(['a'])
  expect(filtered(all, '', 'Not flagged').map((r) => r.key)).toEqual(['b'])
  expect(filtered(all, 'boat', 'Flagged')).toEqual([])
})

it('labels a batch by its worst image', () => {
  const { report: batch } = run('a', 'x', { verdicts: [calm.verdicts[0], verdict('x')] })
  expect([labelOf(batch), worstOf(batch).score]).toEqual(['Flagged', 2.5])
})

it('lists runs in the sidebar, and shows the one that is clicked', () => {
  const runs = createRuns(9)
  const sidebar = createSidebar(runs, { copy: vi.fn(), queue: vi.fn() })
  document.body.replaceChildren(sidebar.element)
  expect(sidebar.element.textContent).toContain('No run yet')
  runs.put(run('a', '<b>markup</b>'))
  runs.put(run('b', 'x', calm))
  expect(sidebar.element.querySelectorAll('li').length).toBe(2)
  expect(sidebar.element.querySelector('b')).toBeNull()
  sidebar.element.querySelector('[data-key="a"]').click()
  expect(sidebar.element.querySelector('.dejavu-details').hidden).toBe(false)
  expect(sidebar.element.querySelector('.dejavu-words').textContent).toBe('<b>markup</b>')
  expect(sidebar.element.querySelector('[data-key="a"]').getAttribute('aria-current')).toBe('true')
  sidebar.element.querySelector('.dejavu-details > button').click()
  expect(document.activeElement.dataset.key).toBe('a')
  sidebar.remove()
  runs.put(run('c'))
  expect(sidebar.element.querySelectorAll('li').length).toBe(2)
})

describe('in the sidebar', () => {
  let runs, sidebar, host
  const $ = (selector) => sidebar.element.querySelector(selector)
  const named = (name) => [...sidebar.element.querySelectorAll('button')].filter((b) => b.textContent === name)

  beforeEach(() => {
    runs = createRuns(9)
    host = { copy: vi.fn(async () => true), queue: vi.fn(), calibrate: vi.fn(async () => ({})), machine: vi.fn(async () => ['works torch: 2.1']) }
    sidebar = createSidebar(runs, host)
    document.body.replaceChildren(sidebar.element)
  })

  it('a card tells p and score, and whether the host has answered from its cache', () => {
    runs.put(run('a'))
    runs.put({ ...run('b', 'x', { verdicts: [verdict('x', { p_value: 0.67, score: 0.2, label: 'Not flagged' })] }), kept: true })
    expect($('[data-key="a"]').textContent).toMatch(/p ≤ 0\.001 · score 2\.5 · \d\d:\d\d:\d\d/)
    expect($('[data-key="b"]').textContent).toMatch(/p 0\.67 · score 0\.2 · .* · from the cache/)
  })

  it('two runs stand side by side, the older one first', () => {
    runs.put(run('a', 'a red cat'), 1000)
    expect(named('Compare')).toEqual([])
    runs.put(run('b', 'a cat', calm), 2000)
    runs.put(run('c', 'a dog'), 3000)
    const pick = (key) => $(`.dejavu-pick[data-key="${key}"]`).click()
    pick('b')
    expect($('table')).toBeNull()
    expect($('[role="status"]').textContent).toContain('Choose a second one')
    pick('a')
    const rows = () => [...sidebar.element.querySelectorAll('tr')].map((row) => [...row.children].slice(1).map((cell) => cell.textContent))
    expect(rows()[1]).toEqual(['▲ Flagged Likely memorised, p ≤ 0.001: none of 1,000 ordinary prompts scores as high.', '✓ Not flagged Nothing unusual.'])
    expect(rows()[2]).toEqual(['2.5', '0.2'])
    expect(rows()[4]).toEqual(['a red cat', 'a cat'])
    pick('c')
    expect(rows()[4]).toEqual(['a red cat', 'a dog'])
    named('End comparing')[0].click()
    expect($('table')).toBeNull()
  })

  it('asks for a calibration of the run that is shown', async () => {
    host.calibrate.mockResolvedValueOnce({ promptId: 'mine' })
    runs.put(run('a', 'x', { lacks_calibration: true }))
    $('.dejavu-run').click()
    named('Calibrate with these settings')[0].click()
    await Promise.resolve()
    expect(host.calibrate.mock.calls[0][0].key).toBe('a')
    await vi.waitFor(() => expect(sidebar.element.textContent).toContain('In the queue'))
    runs.put({ ...run('other', 'x', { calibrating: { done: 1, count: 100 } }), promptId: 'queued before', finished: false })
    expect($('progress')).toBeNull()
    runs.put({ ...run('b', 'x', { calibrating: { done: 34, count: 100 } }), promptId: 'mine', finished: false })
    expect($('.dejavu-progress').textContent).toContain('34 of 100')
  })

  it('shows what works on this machine as text, and copies it', async () => {
    host.machine.mockResolvedValueOnce(['works <b>torch</b>: 2.1', 'fails cpu'])
    named('Check this machine')[0].click()
    await vi.waitFor(() => expect($('.dejavu-lines').textContent).toBe('works <b>torch</b>: 2.1\nfails cpu'))
    named('Copy')[0].click()
    expect(host.copy).toHaveBeenCalledWith('works <b>torch</b>: 2.1\nfails cpu')
    host.machine.mockRejectedValueOnce(Error('404 Not Found'))
    named('Check this machine')[0].click()
    await vi.waitFor(() => expect($('.dejavu-machine').textContent).toContain('The server did not answer: 404 Not Found'))
  })

  it('what was live has ended when nothing is queued any more', () => {
    runs.put({ ...run('a'), finished: false })
    expect($('.dejavu-run').textContent).toContain('sampling')
    $('.dejavu-run').click()
    runs.idle()
    expect($('.dejavu-run').textContent).toMatch(/ended early/)
    expect($('.dejavu-run').textContent).not.toContain('sampling')
    expect($('.dejavu-verdict').textContent).toContain('The run was ended early.')
    runs.put(run('a'))
    expect($('.dejavu-verdict').textContent).not.toContain('ended early')
  })
})
