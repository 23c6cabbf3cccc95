"""Formulas as MathML, which browsers draw by themselves: no script, no network"""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

FRACTIONS = {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}


def _convert(tex: str, node: nodes.Node, block: bool) -> str:
    "A formula as MathML; a warning, and the formula as it is written, if it cannot be converted"
    for sign, written in FRACTIONS.items():
        tex = tex.replace(sign, written)
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", tex, error, location=node)
        return nodes.Text(tex).astext()


def _inline(writer, node: nodes.math) -> None:
    writer.body.append(f'<span class="math">{_convert(node.astext(), node, False)}</span>')
    raise nodes.SkipNode


def _block(writer, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{_convert(node.astext(), node, True)}</div>\n')
    raise nodes.SkipNode


def setup(app) -> None:
    "Register the renderer under the name mathml"
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
