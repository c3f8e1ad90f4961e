/** What works on this machine: lines of text that can be copied, for the sidebar and the host's settings. */

import { button, make } from './dom.js'

/** An element with a button; ``host``: {machine() -> lines of text, copy(text)}. */
export function createMachine(host) {
  const told = make('p', { class: 'dejavu-quiet', role: 'status' })
  const lines = make('pre', { class: 'dejavu-lines', tabindex: 0, 'aria-label': 'What works on this machine', hidden: true })
  const copy = button('Copy', async () => {
    told.textContent = await host.copy(lines.textContent) ? 'Copied.' : 'The browser did not allow copying.'
  }, { hidden: true })
  const check = button('Check this machine', async () => {
    told.textContent = 'Looking at packages, devices and gradients…'
    check.disabled = true
    try {
      lines.textContent = (await host.machine()).join('\n')
      lines.hidden = copy.hidden = false
      told.textContent = ''
    } catch (error) {
      told.textContent = `The server did not answer: ${error.message}`
    }
    check.disabled = false
  })
  return make('div', { class: 'dejavu-machine' }, make('p', { class: 'dejavu-buttons' }, check, copy), told, lines)
}
