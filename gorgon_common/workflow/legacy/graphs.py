"""Translates graphs of `nodes` and `edges` into steps with `type:`, `$after` and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common.documents import Path
from gorgon_common.workflow.legacy.base import STEP_KEYS, Part
from gorgon_common.workflow.schema import suggest


class Graph(Part):
    """Translates `nodes` and `edges` into steps with `type:`, `$after` and conditions."""

    def flatten(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the graph as a file of steps."""
        self.nodes: dict[str, tuple[int, dict[str, Any]]] = {}
        self._read_nodes(data["nodes"])
        self._read_edges(data.get("edges"))
        self._bodies()
        order = self._sorted()
        self.guards: dict[str, list[tuple[str, bool]]] = {}
        steps: list[Any] = []
        for name in order:
            self.guards[name] = self._guard(name)
            if self._kind(name) in {"start", "end"}:
                continue
            if not any(name in body for body in self.inside.values()):
                at: Path = ("steps", len(steps))
                steps.append(self._step(name, at))
        whole = {key: value for key, value in data.items() if key not in {"nodes", "edges"}}
        if not isinstance(whole.get("name"), str) or not whole["name"]:
            whole["name"] = str(data.get("id") or "workflow")
        return {**whole, "steps": steps}

    def _read_nodes(self, nodes: list[Any]) -> None:
        for index, node in enumerate(nodes):
            if not isinstance(node, dict) or not isinstance(node.get("id"), str | int):
                self.error("a node needs an `id`", ("nodes", index))
                continue
            if str(node["id"]) in self.nodes:
                self.error(f"the id `{node['id']}` is used twice", ("nodes", index, "id"))
                continue
            self.nodes[str(node["id"])] = (index, node)

    def _read_edges(self, edges: Any) -> None:
        self.incoming: dict[str, list[tuple[str, str]]] = {name: [] for name in self.nodes}
        self.outgoing: dict[str, list[tuple[str, str]]] = {name: [] for name in self.nodes}
        for index, edge in enumerate(edges if isinstance(edges, list) else ()):
            if not isinstance(edge, dict):
                self.error("an edge needs `source` and `target`", ("edges", index))
                continue
            ends = [edge.get("source", edge.get("from")), edge.get("target", edge.get("to"))]
            unknown = [end for end in ends if str(end) not in self.nodes]
            for end in unknown:
                self.error(f"there is no node `{end}`", ("edges", index), suggest(str(end), self.nodes))
            if not unknown:
                source, target = str(ends[0]), str(ends[1])
                handle = str(edge.get("sourceHandle") or edge.get("source_handle") or edge.get("label") or "").lower()
                self.outgoing[source].append((target, handle))
                self.incoming[target].append((source, handle))

    def _kind(self, name: str) -> str:
        node = self.nodes[name][1]
        return str(node.get("type") or "agent")

    def _bodies(self) -> None:
        """Assign the nodes between a loop's `body` handle and its way back to the loop."""
        self.inside: dict[str, list[str]] = {}
        for name in self.nodes:
            begins = [target for target, handle in self.outgoing[name] if handle in {"body", "loop", "each"}]
            if self._kind(name) != "loop" or not begins:
                continue
            others = [target for target, handle in self.outgoing[name] if handle not in {"body", "loop", "each"}]
            outside = self._reached(others, name)
            self.inside[name] = [entry for entry in self._reached(begins, name) if entry not in outside]
        for loop, body in self.inside.items():
            self.incoming[loop] = [edge for edge in self.incoming[loop] if edge[0] not in body]
            for entry in body:
                self.outgoing[entry] = [edge for edge in self.outgoing[entry] if edge[0] != loop]
                self.incoming[entry] = [edge for edge in self.incoming[entry] if edge[0] != loop]
            self.outgoing[loop] = [edge for edge in self.outgoing[loop] if edge[0] not in body]

    def _reached(self, begins: list[str], stop: str) -> list[str]:
        found: list[str] = []
        waiting = list(begins)
        while waiting:
            name = waiting.pop(0)
            if name == stop or name in found:
                continue
            found.append(name)
            waiting.extend(target for target, _ in self.outgoing[name])
        return found

    def _sorted(self) -> list[str]:
        """Return the nodes in topological order; nodes of a cycle come last, and the compiler rejects them."""
        left = {name: len(self.incoming[name]) for name in self.nodes}
        ready = [name for name, count in left.items() if not count]
        order: list[str] = []
        while ready:
            name = ready.pop(0)
            order.append(name)
            for target, _ in self.outgoing[name]:
                left[target] -= 1
                if not left[target]:
                    ready.append(target)
        return [*order, *(name for name in self.nodes if name not in order)]

    def _guard(self, name: str) -> list[tuple[str, bool]]:
        """Return the branch decisions that hold on every path to the node."""
        ways: list[list[tuple[str, bool]]] = []
        for source, handle in self.incoming[name]:
            way = list(self.guards.get(source, []))
            if self._kind(source) == "branch" and handle in {"true", "false", "yes", "no"}:
                way.append((source, handle in {"true", "yes"}))
            ways.append(way)
        return [entry for entry in ways[0] if all(entry in way for way in ways)] if ways else []

    def _before(self, name: str) -> list[str]:
        """Return the steps that a node follows; start and end nodes are only passed through."""
        found: list[str] = []
        for source, _ in self.incoming[name]:
            found.extend(self._before(source) if self._kind(source) in {"start", "end"} else [source])
        return list(dict.fromkeys(found))

    def _step(self, name: str, at: Path) -> dict[str, Any]:
        index, node = self.nodes[name]
        source: Path = ("nodes", index)
        self.move(at, source)
        data = node.get("data")
        data = dict(data) if isinstance(data, dict) else {}
        step: dict[str, Any] = {"id": name, "type": self._agent_type(name, data), "$after": self._before(name)}
        inner = data.pop("params", None)
        for key in STEP_KEYS - {"id", "type", "params", "action", "next_step"}:
            if key in data and not (key == "condition" and self._kind(name) in {"branch", "loop"}):
                step[key] = data.pop(key)
                self.move((*at, key), (*source, "data", key))
        step["params"] = {**data, **(inner if isinstance(inner, dict) else {})}
        for key in step["params"]:
            where = ("data", "params", key) if isinstance(inner, dict) and key in inner else ("data", key)
            self.move((*at, "params", key), (*source, *where))
        drawn = ("label", "provider", "agent", "agent_type", "icon", "color", "status")
        for key in (*drawn, "condition") if self._kind(name) == "branch" else drawn:
            step["params"].pop(key, None)
        guard = [self._decision(branch, taken) for branch, taken in self.guards.get(name, [])]
        if guard:
            own = [step["condition"]] if isinstance(step.get("condition"), dict) else []
            step["condition"] = {"all": [*guard, *own]} if len(guard) + len(own) > 1 else guard[0]
        if name in self.inside:
            step["params"]["steps"] = [
                self._step(entry, (*at, "params", "steps", position))
                for position, entry in enumerate(self.inside[name])
            ]
        return step

    def _agent_type(self, name: str, data: Mapping[str, Any]) -> str:
        kind = self._kind(name)
        if kind not in {"agent", "default", "custom"}:
            # A branch makes no decision of its own here; its edges carry the condition.
            return "checkpoint" if kind == "branch" else kind
        said = str(data.get("provider") or data.get("agent_type") or data.get("agent") or "claude_code").lower()
        return "openai" if "openai" in said or "gpt" in said else "claude_code"

    def _decision(self, branch: str, taken: bool) -> dict[str, Any]:
        index, node = self.nodes[branch]
        data = node.get("data")
        condition = data.get("condition") if isinstance(data, dict) else None
        if not isinstance(condition, dict):
            self.error("a branch needs a `condition`", ("nodes", index), "{field: …, operator: equals, value: …}")
            condition = {"field": "missing", "operator": "exists"}
        return dict(condition) if taken else {"not": dict(condition)}
