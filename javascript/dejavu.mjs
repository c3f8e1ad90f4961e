/** Automatic1111 and Forge: a word of the panel can be dropped, weakened or restored in the prompt box. */

import { acted } from '../web/prompt.js'

const ACTIONS = { drop: 'Drop', weaken: 'Weaken', restore: 'Restore' }

/** The prompt of a panel and its words, with places in UTF-16 units, as its spans hold them. */
export function read(element) {
  let prompt = ''
  const words = []
  for (const node of element.childNodes) {
    const start = prompt.length
    prompt += node.textContent
    if (node.nodeType === 1) words.push({ text: node.textContent, start, end: prompt.length })
  }
  return { prompt, words }
}

function menu(word, root) {
  root.querySelector('.dejavu-menu')?.remove()
  const bar = document.createElement('span')
  bar.className = 'dejavu-menu'
  bar.setAttribute('role', 'group')
  bar.setAttribute('aria-label', `Change '${word.textContent}' in the prompt`)
  for (const [action, label] of Object.entries(ACTIONS)) {
    const button = document.createElement('button')
    button.type = 'button'
    button.textContent = label
    button.addEventListener('click', () => {
      change(word, action)
      bar.remove()
      word.focus()
    })
    bar.append(button)
  }
  bar.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') {
      bar.remove()
      word.focus()
    }
  })
  word.closest('[data-dejavu="prompt"]').after(bar)
  bar.firstChild.focus()
}

function change(word, action) {
  const holder = word.parentElement
  const { prompt, words } = read(holder)
  const tab = word.closest('[id^="dejavu_panel_"]').id.replace('dejavu_panel_', '')
  const box = word.getRootNode().querySelector(`#${tab}_prompt textarea`)
  const index = [...holder.children].indexOf(word)
  const text = acted(action, prompt, words, box.value, index)
  if (text === null || text === box.value) return
  box.value = text
  box.dispatchEvent(new Event('input', { bubbles: true }))
}

/** Listens on the panels alone. They are filled anew after each run, so the container is asked. */
function watch(root) {
  for (const container of root.querySelectorAll('[id^="dejavu_panel_"]')) {
    const isInner = container.parentElement.closest('[id^="dejavu_panel_"]') // older Gradio gives both elements the id
    if (isInner || container.dataset.dejavuWatched) continue
    container.dataset.dejavuWatched = 'yes'
    const open = (event) => {
      const word = event.target.closest('.dejavu-word')
      if (!word || (event.type === 'keydown' && event.key !== 'Enter' && event.key !== ' ')) return
      event.preventDefault()
      menu(word, container)
    }
    container.addEventListener('click', open)
    container.addEventListener('keydown', open)
  }
}

globalThis.onUiLoaded?.(() => watch(globalThis.gradioApp()))
