/** Two verdicts side by side: before and after a change, or two runs of the sidebar. */

import { badge, make } from './dom.js'
import { besideLabel, number, pText, strength, topWord } from './report.js'
import { pieces, placed } from './prompt.js'

/**
 * A table of ``columns`` [{title, verdict}]; with {prompt, ordinary} beside them also what was found in words, and the
 * prompt with its words shaded.
 */
export function sideBySide(columns, label) {
  const row = (name, cells) => cells.some((cell) => cell !== '')
    && make('tr', {}, make('th', { scope: 'row' }, name), cells.map((cell) => make('td', { dir: 'auto' }, cell)))
  const whole = columns.every(({ prompt }) => prompt !== undefined)
  return make('table', { class: 'dejavu-compare', 'aria-label': label },
    make('thead', {}, make('tr', {}, make('td', {}), columns.map(({ title }) => make('th', { scope: 'col' }, title)))),
    make('tbody', {},
      row('Verdict', columns.map(({ verdict }) => [badge(verdict.label), whole ? ` ${besideLabel(verdict)}.` : null])),
      row('Score', columns.map(({ verdict }) => number(verdict.score))),
      row('p', columns.map(({ verdict }) => pText(verdict).replace(/^p /, ''))),
      whole && row('Prompt', columns.map(shadedPrompt))))
}

function shadedPrompt({ prompt, verdict, ordinary }) {
  if (!prompt) return '(no prompt text)'
  const words = placed(prompt, verdict.words)
  const top = topWord(words)
  const paint = strength(verdict, ordinary)
  const kind = (index) => `dejavu-shaded ${paint < 1 ? 'dejavu-calm' : index === top ? 'dejavu-top' : ''}`
  return pieces(prompt, words).map((piece) => (piece.index === undefined ? piece.text
    : make('span', { class: kind(piece.index), style: shade(words[piece.index].significance, paint) }, piece.text)))
}

/** The style of a word that counts ``significance``, painted as strongly as ``paint``. */
export function shade(significance, paint) {
  return `--dejavu-level:${(significance * paint).toFixed(2)};border-bottom-width:${Math.round(4 * significance * paint)}px`
}
