import { expect, it, vi } from 'vitest'
import { readReport } from '../../web/report.js'
import { createRuns, filtered, highestScore, labelOf } from '../../web/runs.js'
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
  expect([labelOf(batch), highestScore(batch)]).toEqual(['Flagged', 2.5])
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
  sidebar.element.querySelector('.dejavu-details > button').click()
  expect(document.activeElement.dataset.key).toBe('a')
  sidebar.remove()
  runs.put(run('c'))
  expect(sidebar.element.querySelectorAll('li').length).toBe(2)
})
