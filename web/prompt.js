/**
 * The prompt's text and its words: where they stand now, and what dropping, weakening or restoring one makes of it.
 *
 * Pure: strings in, strings out. White space, brackets and separators are treated as Python's drop_word does.
 */

export const WEAKER = 0.8
const DROPPED = 0

// Python's str.isspace: JavaScript's \s knows U+FEFF and lacks U+001C..1F and U+0085.
const SPACE = '\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000'
const EMPTY_GROUP = new RegExp(`\\([${SPACE}]*(?::[${SPACE}]*[+-]?[\\p{Nd}.]+[${SPACE}]*)?\\)|\\[[${SPACE}]*\\]`, 'u')
const BLANK = new RegExp(`[${SPACE}]`, 'u')
const SPACES = new RegExp(`[${SPACE}]+`, 'gu')
const ENDS = /^[ ,;|-]+|[ ,;|-]+$/g
const WEIGHT_BEHIND = /^:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)/
const TOKEN = /[\p{L}\p{M}\p{N}_]+|[^\s]/gu
const OPENING = /^[([]*/
const CLOSING = /(?:(?::\s*[+-]?[\d.]+\s*)?(?<!\\)[)\]]+)?[.,;:!?]*$/
const TABLE_LIMIT = 4_000_000

/** A report's words with places in UTF-16 units instead of code points; those without a place get none. */
export function placed(prompt, words) {
  const units = [0]
  for (const character of prompt) units.push(units.at(-1) + character.length)
  return words.map((word) => {
    const start = units[word.start], end = units[word.end]
    return start < end ? { ...word, start, end } : { ...word, start: null, end: null }
  })
}

/** The prompt in pieces for showing: {text} between words and {text, index} for a word. */
export function pieces(prompt, words) {
  const found = []
  let reached = 0
  const inOrder = words.map((word, index) => ({ ...word, index })).filter((word) => word.start !== null)
  for (const { start, end, index } of inOrder.sort((a, b) => a.start - b.start)) {
    if (start < reached) continue
    if (start > reached) found.push({ text: prompt.slice(reached, start) })
    found.push({ text: prompt.slice(start, end), index })
    reached = end
  }
  if (reached < prompt.length) found.push({ text: prompt.slice(reached) })
  return found
}

/** The prompt with ``changes`` made: word index -> factor on its weight, 0 to drop it. */
export function changed(prompt, words, changes) {
  let text = prompt, dropped = false
  const order = [...changes].sort(([a], [b]) => words[b].start - words[a].start)
  for (const [index, factor] of order) {
    const { start, end } = words[index]
    dropped ||= factor === DROPPED
    text = factor === DROPPED ? without(text, start, end) : weighed(text, start, end, factor)
  }
  return dropped ? tidied(text, prompt) : text
}

/**
 * How ``current`` differs from the prompt: {changes, exact}. Exact where the changes alone explain the text;
 * otherwise somebody has typed, and each word's place in ``current`` is in ``places`` (null where it is gone).
 */
export function compared(prompt, words, current) {
  if (current === prompt) {
    return { changes: new Map(), exact: true, places: words.map(({ start, end }) => (start === null ? null : [start, end])) }
  }
  let first = null
  for (const backwards of [false, true]) {
    const found = explained(prompt, words, current, backwards)
    if (changed(prompt, words, found.changes) === current) return { ...found, exact: true }
    first ??= found
  }
  return { ...first, exact: false }
}

/** ``current`` after one action ('drop', 'weaken' or 'restore') on one word; null where it cannot be done. */
export function acted(action, prompt, words, current, index) {
  const { changes, exact, places } = compared(prompt, words, current)
  if (exact) {
    const next = new Map(changes)
    if (action === 'drop') next.set(index, DROPPED)
    else if (action === 'weaken') next.set(index, round((changes.get(index) || 1) * WEAKER))
    else next.delete(index)
    return changed(prompt, words, next)
  }
  const place = places[index]
  if (action === 'drop') return place && tidied(without(current, ...place), current)
  if (action === 'weaken') return place && weighed(current, ...place, WEAKER)
  return place ? unweighed(current, ...place) : inserted(words, current, places, index)
}

/** The text without start..end; where no white space stood around that, none comes in its place. */
function without(text, start, end) {
  const before = text.slice(0, start), after = text.slice(end)
  const hasGap = !before || !after || BLANK.test(before.at(-1)) || BLANK.test(after[0])
  return `${before}${hasGap ? ' ' : ''}${after}`
}

/** White space closed up, emptied brackets and dangling separators gone: what follows a dropped word. */
function tidied(text, before) {
  if (!EMPTY_GROUP.test(before)) {
    for (let shorter; (shorter = text.replace(new RegExp(EMPTY_GROUP, 'gu'), '')) !== text;) text = shorter
  }
  return text.replace(SPACES, ' ').replace(/^ | $/g, '').replace(ENDS, '')
}

/** The word at start..end with its weight multiplied; punctuation behind it stays outside. */
function weighed(text, start, end, factor) {
  const [from, to] = core(text, start, end)
  const behind = enclosing(text, from, to)
  if (behind) return text.slice(0, to) + `:${round(behind.weight * factor)})` + text.slice(to + behind.length)
  return `${text.slice(0, from)}(${text.slice(from, to)}:${round(factor)})${text.slice(to)}`
}

function unweighed(text, start, end) {
  const [from, to] = core(text, start, end)
  const behind = enclosing(text, from, to)
  return behind && text.slice(0, from - 1) + text.slice(from, to) + text.slice(to + behind.length)
}

/** The weight that a bracket gives to exactly this stretch. */
function enclosing(text, from, to) {
  const behind = text[from - 1] === '(' && text[from - 2] !== '\\' && WEIGHT_BEHIND.exec(text.slice(to))
  return behind ? { weight: Number(behind[1]), length: behind[0].length } : null
}

/** A word's place without the brackets, weight and punctuation around it; all of it where nothing would be left. */
function core(text, start, end) {
  const word = text.slice(start, end)
  const from = OPENING.exec(word)[0].length, to = word.search(CLOSING)
  return from < to ? [start + from, start + to] : [start, end]
}

function inserted(words, current, places, index) {
  const word = words[index]
  const before = words.map((other, i) => [other.start, places[i]]).filter(([start, place]) => place && start < word.start)
  const at = before.length ? before.sort((a, b) => a[0] - b[0]).at(-1)[1][1] : 0
  const weight = at > 0 ? WEIGHT_BEHIND.exec(current.slice(at)) : null
  const end = at + (weight ? weight[0].length : 0)
  const left = current.slice(0, end), right = current.slice(end).trimStart()
  const glue = !right || /^[,;.]/.test(right) ? '' : ' '
  return [left, word.text].filter(Boolean).join(' ') + glue + right
}

function explained(prompt, words, current, backwards) {
  const old = tokens(prompt), now = tokens(current)
  const partner = aligned(old.map((t) => t.text), now.map((t) => t.text), backwards)
  const changes = new Map()
  const places = words.map((word, index) => {
    if (word.start === null) return null
    const [from, to] = core(prompt, word.start, word.end)
    const inside = (limit) => old.flatMap((t, i) => (t.start >= from && t.end <= limit ? [i] : []))
    const mine = inside(to).map((i) => partner[i])
    const together = mine.length && mine.every((j, k) => j !== null && (k === 0 || j === mine[k - 1] + 1))
    if (!together) {
      changes.set(index, DROPPED)
      return null
    }
    const start = now[mine[0]].start, coreEnd = now[mine.at(-1)].end
    const weight = (enclosing(current, start, coreEnd)?.weight ?? 1) / (enclosing(prompt, from, to)?.weight ?? 1)
    if (weight !== 1) changes.set(index, round(weight))
    const all = inside(word.end).map((i) => partner[i])
    const whole = all.every((j, k) => j !== null && (k === 0 || j === all[k - 1] + 1))
    return [start, whole ? now[all.at(-1)].end : coreEnd]
  })
  return { changes, places }
}

function tokens(text) {
  return [...text.matchAll(TOKEN)].map((m) => ({ text: m[0], start: m.index, end: m.index + m[0].length }))
}

/** For each of ``a`` the index of its partner in ``b``, or null: a longest common subsequence. */
function aligned(a, b, backwards) {
  const partner = new Array(a.length).fill(null)
  let head = 0, tail = 0
  const most = Math.min(a.length, b.length)
  const sameTail = () => { while (tail < most - head && a.at(-1 - tail) === b.at(-1 - tail)) tail += 1 }
  if (backwards) sameTail()
  while (head < most - tail && a[head] === b[head]) head += 1
  sameTail()
  for (let i = 0; i < head; i += 1) partner[i] = i
  for (let i = 1; i <= tail; i += 1) partner[a.length - i] = b.length - i
  const rows = a.length - head - tail, columns = b.length - head - tail
  if (!rows || !columns || rows * columns > TABLE_LIMIT) return partner
  const width = columns + 1
  const longest = new Uint16Array((rows + 1) * width)
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      longest[i * width + j] = a[head + i] === b[head + j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1])
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns;) {
    if (a[head + i] === b[head + j]) partner[head + i++] = head + j++
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i += 1
    else j += 1
  }
  return partner
}

const round = (weight) => Math.round(weight * 100) / 100
