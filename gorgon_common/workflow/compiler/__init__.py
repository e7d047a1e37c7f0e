"""Compiles a validated workflow into its Plan.

`layout` determines the nodes, `specs` their contents, and `names` the meaning of the names in their expressions.
`build` combines them and reports all problems at once.  `inputs` checks the inputs of a run.

The contents of a node's `spec`, by kind (keys that the file does not set are absent; texts are templates):

=========== ==========================================================================================================
agent       provider, model ("" : the role's tier at that provider), models ["provider:model", …], tier, role, system,
            prompt (None: `standing` is the task; its material is the values of the names in `given`: inputs, the
            item or the results of a map, and the outputs of the steps in `context`), schema, max_tokens, effort, tools,
            cache {ttl}, estimated_tokens
command     argv [template, …] or shell (text, unsubstituted) with exports {ENV: name}, env {ENV: template}, stdin, cwd,
            allow_failure, timeout (s), schema
action      uses, with, effect, on_doubt
workflow    workflow, with
approval    message, approvers, timeout (s), on_timeout, preview
wait        for (s), until, event, timeout (s)
aggregate   from, how
checkpoint  name, message
map         over, as, max_items, max_parallel, on_item_failure, min_success (0..1)
loop        until (expression or condition), max
group       max_parallel, fail_fast
=========== ==========================================================================================================

Any kind: budget_usd, tokens, on_budget, trust.

In `until:` and inside its body, a loop's own id means the last iteration that has ended: its ref is the body's node.

Order of nodes: steps, on_error, finally, `$gate`, `$finally`, `$end`, then the bodies.  `$gate` depends on the steps
that nothing else depends on, which is equivalent to depending on all steps.  In older files, a step waits for the steps
it refers to without inheriting their skips (an `order` edge), and its `depends_on` joins with `none_failed`.
"""

from gorgon_common.workflow.compiler.build import Compiled, compile_workflow, try_compile
from gorgon_common.workflow.compiler.inputs import check_inputs

__all__ = ["Compiled", "check_inputs", "compile_workflow", "try_compile"]
