import { describe, expect, it } from 'vitest'
import { acted, changed, compared, pieces, placed } from '../../web/prompt.js'
import { NASTY, wordsOf } from './fixture.js'

const split = (prompt) => placed(prompt, wordsOf(prompt))
const act = (action, prompt, index, current = prompt) => acted(action, prompt, split(prompt), current, index)

describe('places', () => {
  it('turns code points into UTF-16 units', () => {
    const words = split('a 👩‍🚀 b')
    expect(words.map((w) => 'a 👩‍🚀 b'.slice(w.start, w.end))).toEqual(['a', '👩‍🚀', 'b'])
  })
  it('gives none to token positions', () => {
    expect(placed('', [{ text: 'token 5', start: 0, end: 0 }])[0].start).toBeNull()
  })
  it.each(Object.entries(NASTY))('cuts a prompt into pieces that make it again: %s', (_, prompt) => {
    expect(pieces(prompt, split(prompt)).map((p) => p.text).join('')).toBe(prompt)
  })
  it('leaves out places beyond the end', () => {
    expect(placed('ab', [{ text: 'x', start: 1, end: 9 }])[0].start).toBeNull()
  })
})

describe('one action', () => {
  it('drops a word and what it leaves dangling', () => {
    expect(act('drop', 'a red, (big:1.3) boat', 2)).toBe('a red, boat')
    expect(act('drop', 'one, two', 1)).toBe('one')
  })
  it('joins words that no white space parts', () => {
    const tags = '1girl,solo,red'
    const words = [[0, 6], [6, 11], [11, 14]].map(([start, end]) => ({ text: tags.slice(start, end), start, end }))
    const left = acted('drop', tags, words, tags, 1)
    expect(left).toBe('1girl,red')
    expect(acted('restore', tags, words, left, 1)).toBe(tags)
  })
  it('weakens a word, its comma outside', () => expect(act('weaken', 'a river, blue', 1)).toBe('a (river:0.8), blue'))
  it('weakens what has a weight already', () => {
    const prompt = 'a (river:1.5) x'
    const words = placed(prompt, [{ text: 'river', start: 3, end: 8 }])
    expect(acted('weaken', prompt, words, prompt, 0)).toBe('a (river:1.2) x')
  })
  it('weakens inside of brackets that belong to the word', () => {
    expect(act('weaken', 'a (river:1.5), x', 1)).toBe('a (river:1.2), x')
    expect(act('weaken', 'a (big river:1.5)', 1)).toBe('a ((big:0.8) river:1.5)')
    expect(act('weaken', 'a [river]', 1)).toBe('a [(river:0.8)]')
    expect(act('weaken', 'a river\\)', 1)).toBe('a (river\\):0.8)')
  })
  it('weakens twice', () => expect(act('weaken', 'a cat', 1, act('weaken', 'a cat', 1))).toBe('a (cat:0.64)'))
  it.each(['drop', 'weaken'])('restores exactly after %s', (action) => {
    const prompt = 'a  (red:1.2), big boat '
    expect(act('restore', prompt, 2, act(action, prompt, 2))).toBe(prompt)
  })
  it('tells equal words apart', () => {
    const prompt = 'a, a b a'
    for (let i = 0; i < 4; i += 1) {
      const after = act('drop', prompt, i)
      expect(compared(prompt, split(prompt), after).exact).toBe(true)
      expect([...compared(prompt, split(prompt), after).changes.values()]).toEqual([0])
    }
  })
  it('keeps two changes apart', () => {
    const prompt = 'one two three four'
    const twice = act('weaken', prompt, 3, act('drop', prompt, 1))
    expect(twice).toBe('one three (four:0.8)')
    expect(act('restore', prompt, 1, twice)).toBe('one two three (four:0.8)')
  })
})

describe('a text that somebody has typed in since', () => {
  const prompt = 'a red boat, at sea'
  const current = 'please draw a red boat, at night'
  it('is told from our own changes', () => expect(compared(prompt, split(prompt), current).exact).toBe(false))
  it('is changed where the word is now', () => {
    expect(act('drop', prompt, 1, current)).toBe('please draw a boat, at night')
    expect(act('weaken', prompt, 2, current)).toBe('please draw a red (boat:0.8), at night')
  })
  it('gets a lost word back behind the one before it', () => {
    expect(act('restore', prompt, 4, current)).toBe('please draw a red boat, at sea night')
    expect(act('restore', prompt, 2, 'now a (red:0.8) at sea')).toBe('now a (red:0.8) boat, at sea')
  })
  it('loses a weight again', () => {
    expect(act('restore', prompt, 1, 'oh a (red:0.5) boat, at sea')).toBe('oh a red boat, at sea')
  })
  it('cannot lose a word that is gone', () => expect(act('drop', prompt, 4, current)).toBeNull())
  it('may be another one altogether', () => {
    expect([...compared(prompt, split(prompt), '').changes.values()]).toEqual([0, 0, 0, 0, 0])
  })
})

it.each(Object.entries(NASTY))('every word can be dropped, weakened and restored: %s', (_, prompt) => {
  const words = split(prompt)
  for (const index of [0, Math.floor(words.length / 2), words.length - 1]) {
    for (const action of ['drop', 'weaken']) {
      const after = acted(action, prompt, words, prompt, index)
      expect(after).not.toBe(prompt)
      expect(acted('restore', prompt, words, after, index)).toBe(prompt)
    }
  }
})

it('changes nothing without changes', () => expect(changed(' a  b ', split(' a  b '), new Map())).toBe(' a  b '))
