// What jsdom lacks: layout is not tested here.
globalThis.ResizeObserver = class {
  observe() {}
  disconnect() {}
}
HTMLCanvasElement.prototype.getContext = () => null
