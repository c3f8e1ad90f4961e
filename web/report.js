/** A report's document: reading it from anywhere, and its values in words. Pure. */

const FORMAT = 'dejavu-report'
const LONGEST = 10_000 // of a list: as many steps as the host's samplers take; of longer ones the rest is not read
const CALM = 0.3 // of the paint of a flagged prompt
const LABELS = ['Flagged', 'Not flagged', 'No verdict']

/**
 * The document with every field that is shown in its right type, or null where this is none of ours.
 * It may come from an image that somebody else made.
 */
export function readReport(value) {
  if (value?.format !== FORMAT || value.schema_version !== 1) return null
  const verdicts = list(value.verdicts).filter((v) => v && typeof v === 'object').map(readVerdict)
  if (!verdicts.length) return null
  const { mitigation, ordinary } = value
  return {
    prompt: text(value.prompt),
    promptNode: value.prompt_node == null ? null : String(value.prompt_node),
    verdicts,
    band: list(value.band).filter((b) => [b?.sigma, b?.q05, b?.q50, b?.q95].every(Number.isFinite)),
    ordinary: Number.isFinite(ordinary?.median) && Number.isFinite(ordinary?.high) ? ordinary : null,
    mitigation: mitigation && typeof mitigation === 'object'
      ? {
          before: finite(mitigation.score_before),
          after: finite(mitigation.score_after),
          prompt: text(mitigation.prompt),
          verdicts: list(mitigation.verdicts).map(readVerdict),
          losses: list(mitigation.losses).filter(Number.isFinite),
          words: list(mitigation.words).filter((word) => typeof word === 'string'),
          moved: finite(mitigation.moved),
          target: finite(mitigation.target),
          reached: mitigation.reached === true,
        }
      : null,
    notes: list(value.notes).map(text).filter(Boolean),
    lacksCalibration: value.lacks_calibration === true,
    calibrating: readProgress(value.calibrating),
  }
}

/** {done, count} of the ordinary prompts that a run measures first; null where it measures none. */
function readProgress(progress) {
  const { done, count } = progress ?? {}
  return Number.isInteger(done) && Number.isInteger(count) && count > 0 ? { done: Math.min(Math.max(done, 0), count), count } : null
}

function readVerdict(v) {
  const steps = list(v?.score_per_step).map(finite), sigmas = list(v?.sigmas)
  return {
    label: LABELS.includes(v?.label) ? v.label : 'No verdict',
    sentence: text(v?.sentence) || 'No verdict',
    score: finite(v?.score),
    pValue: finite(v?.p_value),
    nulls: finite(v?.nulls) ?? 0,
    times: Math.ceil((finite(v?.batch) ?? 1) / (finite(v?.null_images) || 1)),
    alpha: finite(v?.alpha) ?? 0,
    steps,
    sigmas: steps.map((_, i) => finite(sigmas[i])),
    facts: list(v?.facts).filter((fact) => Array.isArray(fact) && fact.length === 2).map((fact) => fact.map(text)),
    words: list(v?.words).filter((w) => w && typeof w === 'object').map((w) => ({
      text: text(w.text),
      start: Number.isInteger(w.start) ? w.start : 0,
      end: Number.isInteger(w.end) ? w.end : 0,
      raw: finite(w.raw),
      significance: Math.min(1, Math.max(0, finite(w.significance) ?? 0)),
      scoreWithout: finite(w.score_without),
    })),
    view: text(v?.view),
    rawUnit: text(v?.raw_unit),
    where: readMap(v?.where),
  }
}

/** A where-map {width, height, values: bytes}; null where there is none. */
function readMap(where) {
  const { width, height } = where ?? {}
  if (!(Number.isInteger(width) && Number.isInteger(height) && width > 0 && height > 0 && width * height <= LONGEST)) return null
  let values
  try {
    values = Uint8Array.from(atob(text(where.values)), (character) => character.charCodeAt(0))
  } catch {
    return null
  }
  return values.length === width * height ? { width, height, values } : null
}

/** Three significant digits; whole numbers from 100 up. */
export function number(value) {
  if (value === null) return 'not measured'
  if (Math.abs(value) >= 99.95) return Math.round(value).toLocaleString('en-GB')
  if (value !== 0 && Math.abs(value) < 1e-4) {
    return value.toExponential(2).replace(/\.?0+e/, 'e').replace(/e([+-])(\d)$/, 'e$10$2')
  }
  return String(Number(value.toPrecision(3)))
}

/** 'p 0.095', or 'p ≤ 0.001' where no ordinary prompt scored as high; '' without one. */
export function pText({ pValue, nulls, times }) {
  if (pValue === null) return ''
  return nulls && pValue / times * (nulls + 1) < 1.5 ? `p ≤ ${rounded(pValue)}` : `p ${rounded(pValue)}`
}

const rounded = (p) => String(Number(p.toPrecision(2)))

/** How much a word counts beside the others of its prompt: 'counts most', 'counts 57% as much as “Moxgaen”'. */
export function wordValue(word, words) {
  const top = words[topWord(words)]
  if (!word.significance) return 'does not count'
  if (word === top) return 'counts most'
  return `counts ${Math.round(100 * word.significance)}% as much as “${top.text}”`
}

/** What the score would be without a word, in a sentence. */
export function withoutWord(word, verdict, ordinary) {
  if (word.scoreWithout === null) return 'This run did not measure what the score would be without it.'
  const first = verdict.steps[0] ?? verdict.score
  const now = first === null ? '' : ` instead of ${number(first)}`
  const range = ordinary ? `; ordinary prompts score about ${number(ordinary.median)}` : ''
  return `Without it the first step would score about ${number(word.scoreWithout)}${now}${range}.`
}

/** How strongly words are painted, 0 to 1: fully where flagged, else faintly, and the more so the lower the score. */
export function strength(verdict, ordinary) {
  if (verdict.label === 'Flagged') return 1
  const share = ordinary && ordinary.high > 0 && verdict.score !== null ? verdict.score / ordinary.high : 1
  return CALM * Math.min(1, Math.max(0, share))
}

/** The index of the word that counts most; -1 without words. */
export function topWord(words) {
  return words.reduce((best, word, i) => ((word.raw ?? -Infinity) > (words[best]?.raw ?? -Infinity) ? i : best), -1)
}

/** A verdict's sentence where its label stands before it: 'No verdict' is not said twice. */
export function besideLabel({ label, sentence }) {
  const told = sentence.startsWith(`${label}: `) ? sentence.slice(label.length + 2) : sentence
  return told.charAt(0).toUpperCase() + told.slice(1)
}

/** The whole report as plain text, for the clipboard. */
export function asText(report) {
  const many = report.verdicts.length > 1
  const lines = ['Déjà Vu report', `Prompt: ${report.prompt || '(not known)'}`]
  report.verdicts.forEach((verdict, i) => {
    lines.push('', `${many ? `Image ${i + 1}: ` : ''}${verdict.label}. ${besideLabel(verdict)}.`)
    lines.push(...verdict.facts.map(([name, value]) => `${name}: ${value}`))
    const steps = verdict.steps.map((v) => (v === null ? '-' : number(v)))
    if (steps.length) lines.push(`Magnitude at each evaluation: ${steps.join(' ')}`)
  })
  const { words, view } = report.verdicts[0]
  if (words.length) {
    lines.push('', `Words, what counts most first (1 is the most${view && `; ${view}`}):`)
    const order = [...words].sort((a, b) => b.significance - a.significance)
    lines.push(...order.map((word) => {
      const without = word.scoreWithout === null ? '' : `, score without it ${number(word.scoreWithout)}`
      return `${word.significance.toFixed(2)}  ${word.text}${without}`
    }))
  }
  if (report.mitigation) {
    lines.push('', 'Mitigation', ...mitigationFacts(report).map(([name, value]) => `${name}: ${value}`))
  }
  if (report.notes.length) lines.push('', 'Notes', ...report.notes)
  return `${lines.join('\n')}\n`
}

/** (name, value) of what was sampled instead, and what it cost. */
export function mitigationFacts(report) {
  const { before, after, prompt, losses, words, moved, target, reached } = report.mitigation
  const facts = [['Score', `${number(before)} before, ${number(after)} after`]]
  if (prompt && prompt !== report.prompt) facts.push(['Sampled instead', prompt])
  else facts.push(['Sampled instead', 'the same words, with their embedding moved'])
  if (losses.length) facts.push(['Loss', `${number(losses[0])} to ${number(losses.at(-1))} in ${losses.length} steps`])
  if (words.length) facts.push(['Words dropped or weakened', words.join(', ')])
  if (moved !== null) facts.push(['Embedding moved by', `${number(moved)} of its length`])
  if (target !== null) facts.push(['Aimed at a score of', `${number(target)}, ${reached ? 'reached' : 'not reached'}`])
  return facts
}

const list = (value) => (Array.isArray(value) ? value.slice(0, LONGEST) : [])
const text = (value) => (typeof value === 'string' ? value : '')
const finite = (value) => (Number.isFinite(value) ? value : null)
