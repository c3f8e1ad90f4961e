import { describe, expect, it } from 'vitest'
import { mapPixels, tellsParts } from '../../web/map.js'
import { asText, besideLabel, mitigationFacts, number, pText, readReport, strength, topWord, withoutWord, wordValue } from '../../web/report.js'
import { document, NASTY, verdict } from './fixture.js'

describe('reading a document', () => {
  it.each([null, 3, 'x', {}, { format: 'dejavu-report', schema_version: 2, verdicts: [{}] }, { format: 'dejavu-report', schema_version: 1, verdicts: [] }])(
    'takes none that is not ours: %j', (value) => expect(readReport(value)).toBeNull())
  it('survives wrong types in every field', () => {
    const fields = Object.keys(verdict('a'))
    const broken = { ...document('a'), band: 'x', ordinary: 3, notes: {}, mitigation: { losses: 'x', verdicts: [null] } }
    for (const wrong of [null, 'x', 7, {}, [null]]) {
      broken.verdicts = [Object.fromEntries(fields.map((name) => [name, wrong]))]
      expect(readReport(broken).verdicts[0].sentence).toBeTypeOf('string')
      expect(asText(readReport(broken))).toContain('Déjà Vu report')
    }
  })
  it('reads the map', () => expect([...readReport(document()).verdicts[0].where.values].slice(0, 9)).toEqual([255, 255, 255, 255, 0, 0, 0, 0, 255]))
  it('reads how far a calibration is, and nothing that is none', () => {
    const read = (calibrating) => readReport(document('a', { calibrating })).calibrating
    expect(read({ done: 34, count: 100 })).toEqual({ done: 34, count: 100 })
    expect(read({ done: 120, count: 100 })).toEqual({ done: 100, count: 100 })
    for (const wrong of [null, 3, {}, { done: 1 }, { done: 0, count: 0 }, { done: 'x', count: 5 }]) expect(read(wrong)).toBeNull()
    expect(readReport(document('a', { lacks_calibration: true })).lacksCalibration).toBe(true)
    expect(readReport(document('a', { lacks_calibration: 'yes' })).lacksCalibration).toBe(false)
  })
  it('reads no more of a list than a run can have, so that a page outlives any image', () => {
    const many = Array(300_000).fill(1)
    const where = { width: 600, height: 500, values: btoa('a'.repeat(300_000)) }
    const { verdicts, notes } = readReport({
      ...document('a', { verdicts: [verdict('a', { score_per_step: many, sigmas: many, where }), ...many] }), notes: many.map(String),
    })
    expect([verdicts.length, notes.length, verdicts[0].steps.length, verdicts[0].where]).toEqual([1, 10_000, 10_000, null])
  })
  it('takes no map of a wrong size', () => {
    const where = { width: 3, height: 3, values: 'AAAA' }
    expect(readReport(document('a', { verdicts: [verdict('a', { where })] })).verdicts[0].where).toBeNull()
  })
})

it.each([[2.5, '2.5'], [0.12345, '0.123'], [99.9, '99.9'], [99.96, '100'], [1234.5, '1,235'], [0.00001234, '1.23e-05'], [0, '0'], [-3, '-3'], [null, 'not measured']])(
  'writes %s as %s', (value, text) => expect(number(value)).toBe(text))

it('says what the score would be without a word', () => {
  const report = readReport(document('a b'))
  const [word] = report.verdicts[0].words
  expect(withoutWord(word, report.verdicts[0], report.ordinary)).toBe(
    'Without it the first step would score about 0.5 instead of 2.5; ordinary prompts score about 0.3.')
  expect(withoutWord({ ...word, scoreWithout: null }, report.verdicts[0], null)).toContain('did not measure')
})

it('says how much a word counts, without a unit', () => {
  const { words } = readReport(document('a b c d')).verdicts[0]
  expect(words.map((word) => wordValue(word, words))).toEqual(['counts 25% as much as “d”', 'counts 50% as much as “d”', 'counts 75% as much as “d”', 'counts most'])
  expect(wordValue({ ...words[0], significance: 0 }, words)).toBe('does not count')
})

it.each([[0.000999, 1000, 'p ≤ 0.001'], [0.00198, 1000, 'p 0.002'], [0.0952, 20, 'p 0.095'], [null, 0, '']])('writes p %s of %s', (pValue, nulls, text) => {
  expect(pText({ pValue, nulls, times: 1 })).toBe(text)
})

it('paints words of an ordinary prompt faintly', () => {
  const ordinary = { median: 0.3, high: 0.6 }
  expect(strength({ label: 'Flagged', score: 2.5 }, ordinary)).toBe(1)
  expect(strength({ label: 'Not flagged', score: 0.3 }, ordinary)).toBeCloseTo(0.15)
  expect(strength({ label: 'No verdict', score: 2.5 }, null)).toBeLessThan(0.5)
})

it('finds the word that counts most, also among negative values', () => {
  expect(topWord([{ raw: -3 }, { raw: -1 }, { raw: -2 }])).toBe(1)
  expect(topWord([])).toBe(-1)
})

it('writes the report as text', () => {
  const text = asText(readReport(document('a b', { notes: ['a note'] })))
  expect(text).toContain('Prompt: a b')
  expect(text).toContain('Flagged. Likely memorised, p ≤ 0.001')
  expect(text).toContain('Words, what counts most first (1 is the most; confirmed gradient):\n1.00  b, score without it 0.5')
  expect(text).toContain('2.5 2.1 - 1.4')
  expect(text).toContain('a note')
})

it('names what was sampled instead and what it cost', () => {
  const mitigation = { score_before: 2.5, score_after: 0.4, prompt: 'a cat', verdicts: [], losses: [2, 1, 0.5], moved: 0.25, target: 0.4, reached: true, words: ['black'] }
  const facts = Object.fromEntries(mitigationFacts(readReport(document('a black cat', { mitigation }))))
  expect(facts).toEqual({ Score: '2.5 before, 0.4 after', 'Sampled instead': 'a cat', Loss: '2 to 0.5 in 3 steps',
    'Words dropped or weakened': 'black', 'Embedding moved by': '0.25 of its length', 'Aimed at a score of': '0.4, reached' })
})

it('colours a map from dark to light', () => {
  const pixels = mapPixels(readReport(document()).verdicts[0].where)
  expect([...pixels.slice(0, 4)]).toEqual([252, 255, 164, 255])
  expect([...pixels.slice(-4)]).toEqual([0, 0, 4, 255])
})

it('tells a map of parts from noise', () => {
  let state = 7
  const noise = () => (state = (state * 16807) % 2147483647) % 256
  expect(tellsParts(readReport(document()).verdicts[0].where)).toBe(true)
  for (const side of [8, 16, 32]) {
    expect(tellsParts({ width: side, height: side, values: Uint8Array.from({ length: side * side }, noise) })).toBe(false)
  }
  expect(tellsParts({ width: 8, height: 8, values: new Uint8Array(64) })).toBe(false)
  expect(tellsParts({ width: 2, height: 2, values: Uint8Array.from([0, 64, 128, 255]) })).toBe(false)
})

it.each(Object.entries(NASTY))('keeps the prompt as it is: %s', (_, prompt) => {
  expect(asText(readReport(document(prompt)))).toContain(prompt)
})

it('says what a label says once', () => {
  expect(besideLabel({ label: 'No verdict', sentence: 'No verdict: the prompt is empty' })).toBe('The prompt is empty')
  expect(besideLabel({ label: 'Flagged', sentence: 'Likely memorised, p = 0.01' })).toBe('Likely memorised, p = 0.01')
})
