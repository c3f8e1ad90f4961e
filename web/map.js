/** The where-map: whether it says something, and how it is drawn: smoothed, its brightness alone carries the order. */

const MAP_SIDE = 256 // pixels of a where-map when drawn
const PARTS = 4
const ABOVE_NOISE = 0.2 // of the variance
const RAMP = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]]

/**
 * Whether a where-map tells parts of the image apart: of its variance, the share that lies between the sixteen parts of a
 * 4 x 4 grid is far above that of noise, which is one over the cells of a part.
 */
export function tellsParts({ width, height, values }) {
  const parts = Array.from({ length: PARTS * PARTS }, () => [])
  values.forEach((value, i) => {
    const row = Math.floor((PARTS * Math.floor(i / width)) / height), column = Math.floor((PARTS * (i % width)) / width)
    parts[PARTS * row + column].push(value)
  })
  const whole = variance([...values])
  if (!whole || parts.some((part) => !part.length)) return false
  return variance(parts.map(mean)) / whole > ABOVE_NOISE + 1 / (values.length / parts.length)
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length
const variance = (values) => {
  const middle = mean(values)
  return mean(values.map((value) => (value - middle) ** 2))
}

/** Draw a where-map smoothed, as large as an image is shown. */
export function drawMap(canvas, map) {
  const small = canvas.ownerDocument.createElement('canvas')
  small.width = map.width
  small.height = map.height
  small.getContext('2d')?.putImageData(new ImageData(mapPixels(map), map.width, map.height), 0, 0)
  const scale = MAP_SIDE / Math.max(map.width, map.height)
  canvas.width = Math.round(map.width * scale)
  canvas.height = Math.round(map.height * scale)
  const context = canvas.getContext('2d')
  if (!context) return
  context.imageSmoothingQuality = 'high'
  context.drawImage(small, 0, 0, canvas.width, canvas.height)
}

/** RGBA bytes of a where-map in a dark-to-light ramp after inferno: brightness alone carries the order. */
export function mapPixels({ width, height, values }) {
  const pixels = new Uint8ClampedArray(4 * width * height)
  const low = Math.min(...values), span = (Math.max(...values) - low) || 1
  values.forEach((value, i) => {
    const at = ((value - low) / span) * (RAMP.length - 1)
    const below = Math.min(Math.floor(at), RAMP.length - 2)
    const mix = (channel) => RAMP[below][channel] + (at - below) * (RAMP[below + 1][channel] - RAMP[below][channel])
    pixels.set([mix(0), mix(1), mix(2), 255], 4 * i)
  })
  return pixels
}
