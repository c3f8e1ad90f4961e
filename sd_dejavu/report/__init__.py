"""One renderer for everybody who shows a verdict: words, SVG charts, images, an HTML page, a terminal panel."""
