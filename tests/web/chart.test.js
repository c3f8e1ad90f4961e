import { expect, it, vi } from 'vitest'
import { bandAt, drawChart, ticks } from '../../web/chart.js'

const curve = { steps: [2.5, 2.1, null, 1.4], sigmas: [14.6, 9.2, 5.1, 2.0] }
const band = curve.sigmas.map((sigma) => ({ sigma, q05: 0.1, q50: 0.3, q95: 0.6 }))
const draw = (more = {}) => drawChart({ curve, band, ordinary: { median: 0.3, high: 0.6 }, width: 400, tell: () => {}, ...more })

it('draws the curve over the band, with a gap where nothing was measured', () => {
  const svg = draw()
  expect(svg.querySelectorAll('circle').length).toBe(3)
  expect(svg.querySelectorAll('polyline.dejavu-line').length).toBe(2)
  expect(svg.querySelectorAll('.dejavu-band').length).toBe(1)
  expect(svg.querySelector('.dejavu-ordinary')).toBeNull()
  expect(svg.getAttribute('aria-label')).toBe(
    'Magnitude at each evaluation. This prompt: 1.4 to 2.5 over 3 evaluations, above the ordinary range at 3 of 3.')
})

it('marks what is ordinary at the first step where there is no band', () => {
  expect(draw({ band: [] }).querySelectorAll('.dejavu-ordinary').length).toBe(2)
  expect(draw({ band: [], ordinary: null }).querySelector('.dejavu-ordinary')).toBeNull()
})

it('keeps every mark inside', () => {
  for (const width of [260, 900]) {
    const svg = draw({ width })
    const places = [...svg.querySelectorAll('circle')].map((c) => [Number(c.getAttribute('cx')), Number(c.getAttribute('cy'))])
    for (const [x, y] of places) expect(x > 46 && x < width && y >= 10 && y <= 152).toBe(true)
  }
})

it('draws a second curve with another mark and line', () => {
  const svg = draw({ after: { steps: [null, 0.4, 0.4, 0.3, 0.2], sigmas: [14.6, 9.2, 5.1, 2.0, 1.0] } })
  expect(svg.querySelectorAll('rect.dejavu-after').length).toBe(4)
})

it('tells values on hover and by arrow keys', () => {
  const tell = vi.fn()
  const svg = draw({ tell })
  svg.getBoundingClientRect = () => ({ left: 0, width: 400 })
  svg.dispatchEvent(new MouseEvent('pointermove', { clientX: 60 }))
  expect(tell).toHaveBeenLastCalledWith('Evaluation 1: 2.5; ordinary prompts 0.1 to 0.6, median 0.3')
  svg.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }))
  svg.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }))
  expect(tell).toHaveBeenLastCalledWith('Evaluation 3: not measured; ordinary prompts 0.1 to 0.6, median 0.3')
  svg.dispatchEvent(new Event('pointerleave'))
  expect(tell).toHaveBeenLastCalledWith('')
})

it('finds the band by noise level', () => {
  expect(bandAt(band, 0, 2.0).sigma).toBe(2.0)
  expect(bandAt(band, 0, 3.3)).toBeNull()
})

it.each([[2.5, 4, [0, 1, 2, 3]], [0.6, 3, [0, 0.2, 0.4, 0.6]], [0, 2, [0, 0.5, 1]]])('puts round ticks up to %s', (highest, count, marks) => {
  expect(ticks(highest, count)).toEqual(marks)
})
