/** The session's runs, newest first. Pure but for the time it is given. */

export function createRuns(limit) {
  let runs = []
  const listeners = new Set()
  const changed = () => {
    runs = runs.slice(0, limit)
    for (const listener of listeners) listener(runs)
  }
  return {
    get all() {
      return runs
    },
    /** The newest state of a run: {key, promptId, monitor, workflow, report, document, finished, kept}; ``kept`` of one that
     *  the host answered from its cache. */
    put(run, now = Date.now()) {
      const known = runs.findIndex((r) => r.key === run.key)
      if (known < 0) runs = [{ images: [], time: now, ...run }, ...runs]
      else runs = runs.with(known, { ...runs[known], ended: false, ...run })
      changed()
    },
    imagesFor(key, images) {
      runs = runs.map((r) => (r.key === key ? { ...r, images } : r))
      changed()
    },
    /** Nothing goes on any more: what has not ended was ended early. */
    idle() {
      if (runs.every((r) => r.finished)) return
      runs = runs.map((r) => (r.finished ? r : { ...r, report: { ...r.report, calibrating: null }, finished: true, ended: true }))
      changed()
    },
    keep(count) {
      limit = Math.max(1, count)
      changed()
    },
    /** Calls ``listener`` at every change until the returned function is called. */
    listen(listener) {
      listeners.add(listener)
      return () => listeners.delete(listener)
    },
  }
}

/** The runs whose prompt or verdict holds every word of ``query`` and whose label is ``label`` ('' for any). */
export function filtered(runs, query, label) {
  const wanted = query.toLocaleLowerCase().split(/\s+/u).filter(Boolean)
  return runs.filter(({ report }) => {
    const held = `${report.prompt} ${report.verdicts.map((v) => v.sentence).join(' ')}`.toLocaleLowerCase()
    return (!label || labelOf(report) === label) && wanted.every((word) => held.includes(word))
  })
}

/** One label for a run of several images: 'Flagged' where any is. */
export function labelOf(report) {
  const labels = report.verdicts.map((v) => v.label)
  return ['Flagged', 'Not flagged'].find((label) => labels.includes(label)) ?? 'No verdict'
}

/** The verdict that stands for a run: of its images, the one with the highest score. */
export function worstOf({ verdicts }) {
  return verdicts.reduce((worst, verdict) => ((verdict.score ?? -Infinity) > (worst.score ?? -Infinity) ? verdict : worst))
}
