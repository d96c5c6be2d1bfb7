"""A model's graphs before and after the rewrite: as text, as a picture, as a page for a browser.

found = inspect(model, args, kwargs, Config())  one Inspected per graph
lines        what is shown: operations as lines, before and after aligned
tree         the same by modules
text         for a terminal
svg          a picture, drawn by Graphviz
html         a self-contained page for a browser
onnx_model   the nodes of an ONNX file as lines
"""

from graphquant.visualize.lines import Inspected, Line, Row, align, inspect

__all__ = ["Inspected", "Line", "Row", "align", "inspect"]
