/** Magnitude at each evaluation over the null band, as inline SVG that tells its values on hover and by arrow keys. */

import { number } from './report.js'

const LEFT = 46, RIGHT = 12, TOP = 10, BOTTOM = 38
const SVG = 'http://www.w3.org/2000/svg'

/**
 * ``curve`` and ``after`` are {steps, sigmas}; ``band`` lies under the evaluations of its noise levels; where there is
 * none, ``ordinary`` {median, high} is marked at the first. ``tell`` gets a sentence about the evaluation pointed at.
 */
export function drawChart({ curve, after, band, ordinary, width, height = 190, tell }) {
  const count = Math.max(curve.steps.length, after?.steps.length ?? 0)
  const sigmas = curve.steps.length >= count ? curve.sigmas : after.sigmas
  const under = sigmas.map((sigma, i) => bandAt(band, i, sigma))
  const marker = under.some(Boolean) ? null : ordinary
  const known = [...curve.steps, ...(after?.steps ?? [])].filter((v) => v !== null)
  const highest = Math.max(0, ...known, ...under.map((b) => b?.q95 ?? 0), marker?.high ?? 0)
  const marks = ticks(highest, Math.max(2, Math.floor((height - TOP - BOTTOM) / 36)))
  const x = (index) => LEFT + ((width - LEFT - RIGHT) * (index + 0.5)) / count
  const y = (value) => height - BOTTOM - ((height - BOTTOM - TOP) * value) / marks.at(-1)
  const points = (pairs) => pairs.map((pair) => pair.map((v) => v.toFixed(1)).join(',')).join(' ')
  const told = description(curve, after, under)
  const svg = element('svg', {
    class: 'dejavu-chart', viewBox: `0 0 ${width} ${height}`, width, height, role: 'img', tabindex: 0,
    'aria-label': `Magnitude at each evaluation. ${told}`,
  })
  const add = (name, attributes, text) => svg.append(element(name, attributes, text))

  axes(add, { x, y, marks, count, width, height })
  for (const run of runs(under)) {
    const wide = run.length === 1 ? [-8, 8] : [0]
    const line = (quantile) => run.flatMap(([i, b]) => wide.map((d) => [x(i) + d, y(b[quantile])]))
    add('polygon', { points: points([...line('q95'), ...line('q05').reverse()]), class: 'dejavu-band' })
    add('polyline', { points: points(line('q50')), class: 'dejavu-median' })
  }
  if (marker) {
    const [left, right] = [x(0) - 8, x(0) + 8]
    add('path', { d: `M${x(0)} ${y(marker.median)}V${y(marker.high)}M${left} ${y(marker.high)}H${right}`, class: 'dejavu-ordinary' })
    add('path', { d: `M${left} ${y(marker.median)}H${right}`, class: 'dejavu-ordinary dejavu-dashed' })
  }
  const radius = Math.min(3.5, 1 + 120 / count)
  for (const [{ steps }, kind] of [[curve, 'measured'], [after ?? { steps: [] }, 'after']]) {
    for (const run of runs(steps)) {
      add('polyline', { points: points(run.map(([i, v]) => [x(i), y(v)])), class: `dejavu-line dejavu-${kind}` })
    }
    steps.forEach((v, i) => {
      if (v === null) add('text', { x: x(i), y: height - BOTTOM - 3, class: `dejavu-${kind}`, 'text-anchor': 'middle' }, '×')
      else if (kind === 'measured') add('circle', { cx: x(i), cy: y(v), r: radius, class: 'dejavu-measured' })
      else add('rect', { x: x(i) - radius, y: y(v) - radius, width: 2 * radius, height: 2 * radius, class: 'dejavu-after' })
    })
  }

  const guide = element('path', { class: 'dejavu-guide' })
  svg.append(guide)
  let at = -1
  const point = (index) => {
    at = index
    guide.setAttribute('d', index < 0 ? '' : `M${x(index).toFixed(1)} ${TOP}V${height - BOTTOM}`)
    tell(index < 0 ? '' : sentence(index, curve, after, under[index], index === 0 ? marker : null))
  }
  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect()
    const place = ((event.clientX - box.left) / box.width) * width
    const index = Math.floor(((place - LEFT) / (width - LEFT - RIGHT)) * count)
    point(Math.min(count - 1, Math.max(0, index)))
  })
  svg.addEventListener('pointerleave', () => point(-1))
  svg.addEventListener('blur', () => point(-1))
  svg.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key]
    if (!step) return
    event.preventDefault()
    event.stopPropagation()
    point(Math.min(count - 1, Math.max(0, at + step)))
  })
  return svg
}

function axes(add, { x, y, marks, count, width, height }) {
  const base = height - BOTTOM, right = width - RIGHT
  for (const mark of marks) {
    add('path', { d: `M${LEFT} ${y(mark).toFixed(1)}H${right}`, class: mark === 0 ? 'dejavu-axis' : 'dejavu-grid' })
    add('text', { x: LEFT - 6, y: y(mark) + 4, 'text-anchor': 'end' }, String(mark))
  }
  const every = Math.max(1, Math.round(nice(count / ((right - LEFT) / 44))))
  for (let step = 1; step <= count; step += step === 1 && every > 1 ? every - 1 : every) {
    add('path', { d: `M${x(step - 1).toFixed(1)} ${base}v4`, class: 'dejavu-axis' })
    add('text', { x: x(step - 1), y: base + 16, 'text-anchor': 'middle' }, String(step))
  }
  add('text', { x: (LEFT + right) / 2, y: height - 5, 'text-anchor': 'middle' }, 'step (model evaluation)')
  add('text', { transform: `translate(12 ${(base + TOP) / 2}) rotate(-90)`, 'text-anchor': 'middle' }, 'magnitude')
}

function sentence(index, curve, after, band, ordinary) {
  const parts = [`Evaluation ${index + 1}: ${number(curve.steps[index] ?? null)}`]
  if (after?.steps.length) parts.push(`after mitigation ${number(after.steps[index] ?? null)}`)
  if (band) parts.push(`ordinary prompts ${number(band.q05)} to ${number(band.q95)}, median ${number(band.q50)}`)
  if (ordinary) parts.push(`ordinary prompts: median ${number(ordinary.median)}, 95% below ${number(ordinary.high)}`)
  return parts.join('; ')
}

function description(curve, after, under) {
  return [['This prompt', curve.steps], ['After mitigation', after?.steps ?? []]].flatMap(([name, steps]) => {
    const known = steps.filter((v) => v !== null)
    if (!known.length) return []
    const range = `${number(Math.min(...known))} to ${number(Math.max(...known))} over ${known.length} evaluations`
    const banded = steps.map((v, i) => [v, under[i]]).filter(([v, b]) => v !== null && b)
    const above = banded.filter(([v, b]) => v > b.q95).length
    return [`${name}: ${range}${banded.length ? `, above the ordinary range at ${above} of ${banded.length}` : ''}.`]
  }).join(' ')
}

function element(name, attributes, text = '') {
  const made = document.createElementNS(SVG, name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  made.textContent = text
  return made
}

/** The band at this noise level: its entry of the same index if that fits, else any that fits. */
export function bandAt(band, index, sigma) {
  const near = (b) => b && Math.abs(b.sigma - sigma) <= Math.max(1e-6, 1e-3 * Math.max(Math.abs(b.sigma), Math.abs(sigma)))
  return [band[index], ...band].find(near) ?? null
}

/** Stretches without null, as [index, value]. */
function runs(values) {
  const found = [[]]
  values.forEach((value, i) => (value === null ? found.push([]) : found.at(-1).push([i, value])))
  return found.filter((run) => run.length)
}

/** About ``count`` round steps from 0 to at least ``highest``. */
export function ticks(highest, count) {
  const step = nice((highest || 1) / count)
  const last = Math.ceil((highest || 1) / step - 1e-9)
  return Array.from({ length: last + 1 }, (_, i) => Number((i * step).toPrecision(12)))
}

/** The smallest of 1, 2, 5 times a power of ten that is not below ``rough``. */
function nice(rough) {
  const power = 10 ** Math.floor(Math.log10(rough))
  return [1, 2, 5, 10].map((m) => m * power).find((v) => v >= rough * (1 - 1e-9))
}
