"""One renderer for everybody who shows a verdict: words, SVG charts, pictures, an HTML page, a terminal panel."""
