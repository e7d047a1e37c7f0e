"""The expression language: a subset of CEL, checked on its syntax tree when a file is loaded.

`parse` parses a bare expression (`when:`, `until:`), `parse_template` a text containing `{{ … }}`.  Both are cached.
Their results are immutable and know the names and paths they refer to.  See
docs/decisions/0002-cel-subset-of-our-own.md.
"""

from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions.conditions import condition_expressions, evaluate_condition
from gorgon_common.workflow.expressions.errors import ExpressionSyntaxError, MissingValue
from gorgon_common.workflow.expressions.expression import (
    Expression,
    Path,
    Template,
    parse,
    parse_template,
    render_value,
)
from gorgon_common.workflow.expressions.names import FUNCTIONS, RESERVED, ROOTS, check_id, did_you_mean
from gorgon_common.workflow.expressions.types import Complaint, Type, check, check_condition, conform, infer
from gorgon_common.workflow.expressions.values import MAX_TEXT, MISSING, STEP_FIELDS, Env, StepValue, to_text

__all__ = [
    "FUNCTIONS",
    "MAX_TEXT",
    "MISSING",
    "RESERVED",
    "ROOTS",
    "STEP_FIELDS",
    "Complaint",
    "Env",
    "Expression",
    "ExpressionError",
    "ExpressionSyntaxError",
    "MissingValue",
    "Path",
    "StepValue",
    "Template",
    "Type",
    "check",
    "check_condition",
    "check_id",
    "condition_expressions",
    "conform",
    "did_you_mean",
    "evaluate_condition",
    "infer",
    "parse",
    "parse_template",
    "render_value",
    "to_text",
]
