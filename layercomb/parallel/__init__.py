"""Training on several devices: a mesh, and rules that say which device holds which part."""

from layercomb.parallel.gathered import Gathered
from layercomb.parallel.layout import ALONE, Layout
from layercomb.parallel.mesh import AXES, make_mesh
from layercomb.parallel.specs import RULES, weight_specs

__all__ = ['ALONE', 'AXES', 'RULES', 'Gathered', 'Layout', 'make_mesh', 'weight_specs']
