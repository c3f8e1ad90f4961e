/** Automatic1111 and Forge: what the panel's words and buttons do, and how far our work is while the host is at it. */

import { acted } from '../web/prompt.js'

const ACTIONS = { drop: 'Drop', weaken: 'Weaken ×0.8', restore: 'Restore' }
const ASKED_EVERY = 500 // milliseconds

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

function make(name, attributes, ...contents) {
  const made = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  made.append(...contents)
  return made
}

function button(label, run) {
  const made = make('button', { type: 'button', class: 'dejavu-button' }, label)
  made.addEventListener('click', run)
  return made
}

// ---------------------------------------------------------------------------------------------------- words

function close(container) {
  const card = container.querySelector('.dejavu-card')
  container.querySelector('.dejavu-word[aria-expanded="true"]')?.setAttribute('aria-expanded', 'false')
  card?.remove()
}

/** A card on one word: its value, what the score would be without it, and what can be done with it. */
function open(word, container, root, tab) {
  const wasOpen = word.getAttribute('aria-expanded') === 'true'
  close(container)
  if (wasOpen) return
  const shut = () => {
    close(container)
    word.focus()
  }
  const card = make('div', { class: 'dejavu-card', role: 'dialog', 'aria-label': `The word ${word.textContent}` },
    make('p', {}, make('strong', { dir: 'auto' }, word.textContent), ` ${word.dataset.told ?? ''}`),
    make('p', { class: 'dejavu-buttons' },
      ...Object.entries(ACTIONS).map(([action, label]) => button(label, () => change(word, action, root, tab))),
      button('Generate again', () => generate(root, tab)), button('Close', shut)))
  card.addEventListener('keydown', (event) => event.key === 'Escape' && shut())
  word.setAttribute('aria-expanded', 'true')
  word.closest('[data-dejavu="prompt"]').after(card)
  card.querySelector('button').focus()
}

function change(word, action, root, tab) {
  const holder = word.parentElement
  const { prompt, words } = read(holder)
  const box = root.querySelector(`#${tab}_prompt textarea`)
  const index = [...holder.querySelectorAll('.dejavu-word')].indexOf(word)
  const text = acted(action, prompt, words, box.value, index)
  if (text === null || text === box.value) return
  box.value = text
  box.dispatchEvent(new Event('input', { bubbles: true }))
}

function generate(root, tab) {
  root.querySelector(`#${tab}_generate`).click()
}

/** Lays the map of where the prompt acts over the image that stands in the gallery, or takes it away. */
function toggleWhere(pressed, container, root, tab) {
  const section = pressed.closest('.dejavu-image')
  const figure = section.querySelector('.dejavu-where')
  figure.hidden = !figure.hidden
  pressed.setAttribute('aria-pressed', String(!figure.hidden))
  pressed.textContent = figure.hidden ? 'Show where' : 'Hide where'
  const source = galleryImage([...container.querySelectorAll('.dejavu-image')], section, root.querySelector(`#${tab}_gallery`))
  if (source && !figure.querySelector('.dejavu-made')) {
    figure.querySelector('.dejavu-map').before(make('img', { class: 'dejavu-made', alt: '', src: source }))
  }
}

/** The source of the image that a section of the panel is of; null where the gallery shows others, or none. A grid of all
 * stands before them. */
export function galleryImage(sections, section, gallery) {
  const [small, large] = ['.thumbnails img', '.grid-wrap img'].map((images) => [...(gallery?.querySelectorAll(images) ?? [])])
  const shown = small.length ? small : large
  const before = shown.length - sections.length
  return before === 0 || (before === 1 && sections.length > 1) ? shown[before + sections.indexOf(section)].src : null
}

// ----------------------------------------------------------------------------------------------------- work

let wanted = null // ordinary prompts that the panel's button asks for

/** What a button of ours gives the host with its values: a name for the work, of which progress is asked. */
function begun(place, values) {
  const root = globalThis.gradioApp()
  const digits = Array.from(crypto.getRandomValues(new Uint8Array(12)), (n) => (n % 36).toString(36))
  const task = `task(${digits.join('')})`
  const [where, tab] = place.split(' ')
  show(task, root.querySelector(`#dejavu_${where}_${tab}`), root, where === 'told' && tab in { txt2img: 1, img2img: 1 } ? tab : null)
  return [where === 'panel' ? JSON.stringify({ task, count: wanted }) : task, ...values.slice(1)]
}

/** Says of the images of a panel that get their verdict by what has begun that it is under way; gives a way back. */
function saysThatVerdictsCome(panel) {
  const changed = []
  for (const verdict of panel.querySelectorAll('[data-dejavu="waits"]')) {
    const texts = { '.dejavu-badge': 'Calibrating', '.dejavu-badge + span': 'The verdict comes when the ordinary prompts are measured.' }
    for (const [selector, text] of Object.entries(texts)) {
      const place = verdict.querySelector(selector)
      changed.push([place, place.textContent])
      place.textContent = text
    }
  }
  return () => changed.forEach(([place, text]) => { place.textContent = text })
}

/** Above what will be answered: how far the host is, in its own words, and a button that ends it. */
function show(task, answer, root, tab) {
  const bar = make('progress', { max: 1, 'aria-label': 'Progress' })
  const told = make('span', { role: 'status' }, 'Waiting for the host')
  const stop = button('Stop', () => {
    root.querySelector('[id^="dejavu_stop_"]').click()
    stop.disabled = true
    told.textContent = 'Stopping'
  })
  stop.hidden = true // it ends what the host is at: while ours waits, that is another's
  const shown = make('div', { class: 'dejavu-progress' }, bar, told, stop)
  answer.before(shown)
  answer.classList.add('dejavu-at-work')
  const back = saysThatVerdictsCome(answer)
  let wasActive = false
  const ended = () => {
    shown.remove()
    back()
    answer.classList.remove('dejavu-at-work')
    if (tab) root.querySelector(`#dejavu_judge_${tab}`)?.click()
  }
  const ask = async () => {
    let found = {}
    try {
      const headers = { 'Content-Type': 'application/json' }
      const body = JSON.stringify({ id_task: task, live_preview: false })
      found = await (await fetch('./internal/progress', { method: 'POST', headers, body })).json()
    } catch {
      found = {} // the host did not answer: it is asked again
    }
    wasActive ||= Boolean(found.active)
    stop.hidden = !found.active
    if (found.completed || (wasActive && found.active === false)) return ended()
    if (found.textinfo && (found.active || found.queued) && !stop.disabled) told.textContent = found.textinfo
    if (found.active && found.progress > 0) bar.value = found.progress
    setTimeout(ask, ASKED_EVERY)
  }
  setTimeout(ask, ASKED_EVERY)
}

/** Listens on the panels alone. They are filled anew after each run, so the container is asked. */
function watch(root) {
  for (const container of root.querySelectorAll('[id^="dejavu_panel_"]')) {
    const isInner = container.parentElement.closest('[id^="dejavu_panel_"]') // older Gradio gives both elements the id
    if (isInner || container.dataset.dejavuWatched) continue
    container.dataset.dejavuWatched = 'yes'
    const tab = container.id.replace('dejavu_panel_', '')
    const act = (event) => {
      const word = event.target.closest('.dejavu-word')
      if (!word || (event.type === 'keydown' && event.key !== 'Enter' && event.key !== ' ')) return
      event.preventDefault()
      open(word, container, root, tab)
    }
    container.addEventListener('click', act)
    container.addEventListener('keydown', act)
    container.addEventListener('click', (event) => {
      const pressed = event.target.closest('button[data-dejavu]')
      if (pressed?.dataset.dejavu === 'generate') generate(root, tab)
      if (pressed?.dataset.dejavu === 'where') toggleWhere(pressed, container, root, tab)
      if (pressed?.dataset.dejavu === 'calibrate' && !container.classList.contains('dejavu-at-work')) {
        wanted = Number(pressed.dataset.count)
        root.querySelector(`#dejavu_calibrate_run_${tab}`).click()
      }
    })
  }
}

globalThis.dejavuBegun = begun
globalThis.onUiLoaded?.(() => watch(globalThis.gradioApp()))
