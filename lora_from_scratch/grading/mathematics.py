r"""Decide which of a learner's formulas are rendered.

MathJax, which renders them in nbgrader's pages, can also make links (\href), load extensions (\require), set styles and
define commands. A formula is therefore rendered only if it uses no command other than those listed here; otherwise its
source is shown.
"""

from __future__ import annotations

import re

COMMAND = re.compile(r"\\([a-zA-Z]+|.)", re.DOTALL)
SYMBOLS = frozenset("\\,:;! {}|#%&$_>\n")  # of one character: spaces, the end of a row, escaped characters
GREEK = """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi omicron pi varpi rho
varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega
"""
OPERATORS = """
sum prod coprod int iint iiint oint bigcup bigcap bigoplus bigotimes bigvee bigwedge lim limsup liminf max min sup inf
arg argmax argmin det dim ker rank deg gcd hom exp log ln lg sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos
arctan Pr operatorname mod bmod pmod pm mp times div cdot ast star circ bullet oplus ominus otimes oslash odot dagger
wedge vee land lor lnot neg cap cup setminus sqcap sqcup uplus wr amalg diamond triangle nabla partial
"""
RELATIONS = """
le leq leqslant ge geq geqslant ne neq equiv approx approxeq sim simeq cong propto ll gg prec succ preceq succeq
subset supset subseteq supseteq subsetneq supsetneq in ni notin mid nmid parallel perp models vdash dashv asymp doteq
triangleq coloneqq lesssim gtrsim not to gets mapsto longmapsto leftarrow rightarrow leftrightarrow Leftarrow
Rightarrow Leftrightarrow longrightarrow longleftarrow Longrightarrow Longleftarrow iff implies impliedby uparrow
downarrow updownarrow Uparrow Downarrow nearrow searrow swarrow nwarrow hookrightarrow hookleftarrow xrightarrow
xleftarrow rightharpoonup rightleftharpoons leadsto
"""
LAYOUT = """
frac dfrac tfrac cfrac sqrt root binom dbinom tbinom over choose left right middle big Big bigg Bigg bigl bigr Bigl
Bigr biggl biggr Biggl Biggr bigm lbrace rbrace lbrack rbrack langle rangle lvert rvert lVert rVert vert Vert lfloor
rfloor lceil rceil backslash quad qquad thinspace enspace begin end hline limits nolimits displaystyle textstyle
scriptstyle substack underset overset stackrel underbrace overbrace notag nonumber tag space
"""
LETTERS = """
mathbf mathbb mathcal mathfrak mathit mathrm mathsf mathscr mathtt boldsymbol bm bf rm it text textbf textit textrm
texttt textsf mbox hat widehat tilde widetilde bar overline underline vec overrightarrow dot ddot acute grave check
breve mathring prime infty emptyset varnothing forall exists nexists ell hbar Re Im aleph wp top bot angle complement
cdots ldots dots dotsc dotsb vdots ddots colon imath jmath checkmark square blacksquare therefore because
"""
COMMANDS = frozenset(f"{GREEK} {OPERATORS} {RELATIONS} {LAYOUT} {LETTERS}".split())


def is_drawn(formula: str) -> bool:
    """Whether every command in the formula (with or without delimiters) is in the list."""
    return all(name in COMMANDS or name in SYMBOLS for name in COMMAND.findall(formula))
