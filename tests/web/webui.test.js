import { expect, it } from 'vitest'
import { galleryImage } from '../../javascript/dejavu.mjs'

const gallery = (html) => Object.assign(document.createElement('div'), { innerHTML: html })
const images = (...names) => names.map((name) => `<img src="http://host/${name}">`).join('')

it('finds the image of each section in the gallery, behind a grid of all', () => {
  const sections = ['a', 'b']
  const small = gallery(`<div class="preview">${images('b')}</div><div class="thumbnails">${images('grid', 'a', 'b')}</div>`)
  expect(sections.map((one) => galleryImage(sections, one, small))).toEqual(['http://host/a', 'http://host/b'])
  const large = gallery(`<div class="grid-wrap">${images('a', 'b')}</div>`)
  expect(galleryImage(sections, 'b', large)).toBe('http://host/b')
})

it('finds none where the gallery shows others, or nothing', () => {
  expect(galleryImage(['a'], 'a', gallery(`<div class="grid-wrap">${images('x', 'a')}</div>`))).toBeNull()
  expect(galleryImage(['a'], 'a', gallery(''))).toBeNull()
  expect(galleryImage(['a'], 'a', null)).toBeNull()
})
