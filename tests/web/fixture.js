/** A report as the server sends it, and the parts that tests change. */

const codePoints = (text) => [...text].length

export function wordsOf(prompt, { without = 0.5 } = {}) {
  return [...prompt.matchAll(/\S+/gu)].map((m, i, all) => {
    const start = codePoints(prompt.slice(0, m.index))
    const significance = (i + 1) / all.length
    return { text: m[0], start, end: start + codePoints(m[0]), raw: 2 * significance, significance, score_without: without }
  })
}

export function verdict(prompt, changes = {}) {
  return {
    label: 'Flagged', sentence: 'Likely memorised, p ≤ 0.001: none of 1,000 ordinary prompts scores as high',
    prompt, score: 2.5, p_value: 0.000999, flagged: true, alpha: 0.01, score_kind: 'first step', unit: 'l2', images: 1,
    baseline: 'negative prompt', nulls: 1000, null_style: null, why: null,
    score_per_step: [2.5, 2.1, null, 1.4], sigmas: [14.6, 9.2, 5.1, 2.0],
    facts: [['Score', '2.5 (L2, first step, 1 image)'], ['p', '<= 0.001 (flagged from 0.01 down)']],
    words: wordsOf(prompt), view: 'confirmed gradient', raw_unit: 'gradient times loss',
    where: { width: 8, height: 8, values: btoa('\xff\xff\xff\xff\x00\x00\x00\x00'.repeat(4) + '\x00'.repeat(32)) }, ...changes,
  }
}

export function document(prompt = 'Study Of A Black Car By Moxgaen', changes = {}) {
  return {
    format: 'dejavu-report', schema_version: 1, prompt, prompt_node: '3', monitor: '5', flagged: true,
    verdicts: [verdict(prompt)],
    band: [14.6, 9.2, 5.1, 2.0].map((sigma) => ({ sigma, q05: 0.1, q50: 0.3, q95: 0.6 })),
    ordinary: { median: 0.3, high: 0.6 }, mitigation: null, setting: null, notes: [], ...changes,
  }
}

export const NASTY = {
  markup: '<img src=x onerror="window.hit=1"> <script>window.hit=1</script> &amp; "quoted"',
  'right to left': 'תמונה של חתול שחור بقلم فنان',
  emoji: 'a 👩‍🚀 riding 🦄 under 🏳️‍🌈 skies',
  'embedding named like a tag': 'photo embedding:<b>bold</b> (embedding:</div>:1.2)',
  long: Array.from({ length: 800 }, (_, i) => `word${i}`).join(' ').slice(0, 5000),
}
