import { describe, expect, it } from 'vitest'
import { promptsFor, timeLeft, withCalibration } from '../../web/calibrate.js'

const text = (clip = ['1', 1]) => ({ class_type: 'CLIPTextEncode', inputs: { clip, text: 'a cat' } })
const simple = (changes = {}) => ({
  1: { class_type: 'CheckpointLoaderSimple', inputs: {} },
  3: text(), 4: text(['9', 0]),
  5: { class_type: 'DejaVuMonitor', inputs: { model: ['1', 0], calibrate_first: 0, alpha: 0.01 } },
  6: { class_type: 'KSampler', inputs: { model: ['5', 0], positive: ['3', 0], negative: ['4', 0], seed: 3 } },
  7: { class_type: 'DejaVuVerdict', inputs: { monitor: ['5', 1], samples: ['6', 0] } },
  ...changes,
})
const monitor = (output, id = '7', of = '5') => withCalibration(output, id).output[of].inputs

it.each([[0.01, 100], [0.05, 100], [0.001, 1000], [0.004, 300], [0, 100]])('counts the prompts that alpha %s takes', (alpha, count) => expect(promptsFor(alpha)).toBe(count))

describe('what is queued to calibrate', () => {
  it('has the count', () => {
    expect(monitor(simple())).toEqual({ model: ['1', 0], calibrate_first: 100, alpha: 0.01 })
    expect(monitor(simple(), '5')).toEqual(monitor(simple(), '7'))
  })

  it('leaves the graph as it is', () => {
    const output = simple(), before = structuredClone(output)
    withCalibration(output, '7')
    expect(output).toEqual(before)
  })

  it.each([
    ['no Monitor', simple({ 7: { class_type: 'DejaVuVerdict', inputs: {} } }), '7', 'link the Monitor’s monitor output'],
    ['an Explain node', simple({ 7: { class_type: 'DejaVuExplain', inputs: { model: ['1', 0] } } }), '7', 'put a Monitor and a Verdict'],
    ['a Verdict that is muted', simple(), '99', 'muted or bypassed'],
  ])('says the one thing to do: %s', (_, output, id, why) => {
    const found = withCalibration(output, id)
    expect(found.output).toBeUndefined()
    expect(found.why).toContain(why)
  })
})

it.each([
  [0, 10, ''], [10, 10, 'A few seconds left'], [10, 55, 'Less than a minute left'], [34, 34, 'About a minute left'],
  [20, 60, 'About 4 minutes left'], [5, 200, 'About an hour left'], [5, 600, 'About 3 hours left'], [4, 200, ''],
])('says how long %s of 100 in %s s leave', (done, seconds, told) => {
  const count = told.startsWith('A few') ? 12 : told.startsWith('Less') ? 16 : 100
  expect(timeLeft({ at: 0, done: 0 }, 1000 * seconds, { done, count })).toBe(told)
})
