/** Small helpers for elements. Text goes in as text, never as markup. */

/** An element with attributes, listeners (functions under 'on...') and children; null ones are left out. */
export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue
    if (typeof value === 'function') made.addEventListener(key.slice(2), value)
    else made.setAttribute(key, value === true ? '' : value)
  }
  made.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false && child !== ''))
  return made
}

export function button(label, onclick, attributes = {}) {
  return make('button', { type: 'button', onclick, ...attributes }, label)
}

/** 'Flagged', 'Not flagged' or 'No verdict', told by text and sign as well as by colour. */
export function badge(label) {
  const sign = { Flagged: '▲', 'Not flagged': '✓' }[label] ?? '–'
  const kind = label.toLowerCase().replace(' ', '-')
  return make('span', { class: `dejavu-badge dejavu-${kind}` }, make('span', { 'aria-hidden': 'true' }, sign), ` ${label}`)
}
