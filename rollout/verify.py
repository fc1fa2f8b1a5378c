"""`pacenote verify-template`: what a model's chat template does with history, tried on a CPU.

Plays conversations of every order of roles (`proof`) and says which only append, which make the template rewrite what
was already sampled, what ends a turn, and what becomes of thinking. See docs/templates.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacenote.rollout.errors import SessionError
from pacenote.rollout.messages import ROLES, parse_message
from pacenote.rollout.orders import KINDS, WITHOUT_THINKING, conversations, orders, well_formed
from pacenote.rollout.proof import LEFT_OUT, REFUSED, REWRITES, Order, Proof, Stage, plain, sample, stop_ids, turn
from pacenote.rollout.template import FAMILIES, Template
from pacenote.rollout.tito import FLAG, extend


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found about a template.

    Attributes:
        template: it.
        roles: that may be appended.
        arguments: template arguments it was tried with.
        boundaries: stop token (or "" for an answer cut by length) -> role that follows -> the text that is appended
            before that message's words; None where the template refuses.
        proof: the conversations' outcomes.
    """

    template: Template
    roles: tuple[str, ...]
    arguments: Mapping[str, Any]
    boundaries: Mapping[str, Mapping[str, str | None]]
    proof: Proof

    @property
    def proven(self) -> bool:
        """Nothing but appending was seen for the roles, each was seen, and no prompt had other tokens than its text."""
        seen = {role for _, roles in self.proof.outcomes for role in roles}
        return not self.proof.wrong and not self.proof.unproven(self.roles) and set(self.roles) <= seen

    def json(self) -> str:
        """One JSON object."""
        template, family = self.template, self.template.family
        return json.dumps(
            {
                "family": family.name,
                "fixed": dict(family.fixed),
                "arguments": dict(self.arguments),
                "closing": template.closing,
                "header": template.header(self.arguments),
                "boundaries": {stop: dict(after) for stop, after in self.boundaries.items()},
                "thinking": template.find_thinking(self.arguments),
                "thinking_of_family": family.thinking,
                "roles": list(self.roles),
                "proven": self.proven,
                **plain(self.proof),
            },
            ensure_ascii=False,
            indent=2,
        )

    def text(self) -> str:
        """For people."""
        template, family, proof = self.template, self.template.family, self.proof
        fixed = ", ".join(f"{name}={value!r}" for name, value in family.fixed.items()) or "none"
        thinking = template.find_thinking(self.arguments)
        usual = "" if thinking == family.thinking else f" (the family's newest templates: {family.thinking})"
        lines = [
            f"family            {family.name} ({family.models})",
            f"fixed arguments   {fixed}",
            f"closes an answer  {template.closing!r}",
            f"opens an answer   {template.header(self.arguments)!r}",
            f"thinking          {thinking}{usual}",
            *([f"note              {family.remark}"] if family.remark else []),
            "",
            *_boundary_lines(self.boundaries),
            "",
            *_order_lines(proof),
            "",
            f"round trip: {proof.equal} prompts have the tokens of their text; {proof.apart} do not, after an answer "
            "that the template spells otherwise than it was sampled, or that no special token ends; "
            f"{len(proof.wrong)} differ in what was appended",
            *(f"  wrong: {wrong}" for wrong in proof.wrong[:3]),
            "",
            *self._verdict_lines(),
        ]
        return "\n".join(lines)

    def _verdict_lines(self) -> list[str]:
        roles = ", ".join(self.roles)
        if self.proven:
            return [f"proven: history only grows when {roles} is appended ({FLAG} {' '.join(self.roles)})"]
        failed: dict[tuple[str, str], list[Order]] = defaultdict(list)
        for order, outcome in self.proof.unproven(self.roles):
            failed[order[0], outcome].append(order)
        lines = [f"not proven for {roles}:"]
        for (_, outcome), found in failed.items():
            more = f" and {len(found) - 1} more orders" if len(found) > 1 else ""
            lines.append(f"  {_order(found[0])}{more}: {outcome}: {self.proof.reasons.get((found[0], outcome), '')}")
        return [
            *lines,
            "a session renders in full what is rewritten, as a new root: nothing is lost, but prompts repeat",
        ]


def verify(
    template: Template,
    *,
    roles: Sequence[str],
    examples: int,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    thinking: bool = True,
) -> Verdict:
    """Try a template.

    Args:
        template: it.
        roles: that agents may append.
        examples: random conversations, besides every order of up to two roles.
        seed: of these.
        arguments: a request's `chat_template_kwargs`.
        thinking: try answers with thinking, too.

    Raises:
        BadRequest: arguments that a request may not have.
    """
    asked = template.arguments(arguments)
    stage = Stage(template, asked, seed=seed)
    kinds = KINDS if thinking else WITHOUT_THINKING
    for conversation in (*orders(seed, kinds), *conversations(seed, examples, kinds)):
        stage.play(conversation)
    return Verdict(
        template=template,
        roles=tuple(role for role in ROLES if role in roles),
        arguments=asked,
        boundaries=_boundaries(template, asked),
        proof=stage.proof,
    )


def _boundaries(template: Template, arguments: Mapping[str, Any]) -> dict[str, dict[str, str | None]]:
    """What follows an answer, by how it ended and who speaks next, up to the next message's words."""
    call = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": '{"word": "x"}'}}
    user = parse_message({"role": "user", "content": "question"}, "example")
    found: dict[str, dict[str, str | None]] = {}
    for name, stop in (*stop_ids(template).items(), ("", None)):
        found[name] = {}
        for role in ROLES:
            reply = {"role": "assistant", "content": "answer"} | ({"tool_calls": [call]} if role == "tool" else {})
            extra = {"tool_call_id": "call00000", "name": "look"} if role == "tool" else {}
            answer = parse_message(reply, "example")
            more = parse_message({"role": role, "content": "followed"} | extra, "example")
            options: dict[str, Any] = {"path": b"", "tools": None, "arguments": arguments}
            try:
                first = extend(template, [user], parent=None, **options)
                parent = turn(first, answer, sample(template, [user], answer, None, arguments), stop)
                prompt = extend(template, [user, answer, more], parent=parent, **options)
            except SessionError:
                found[name][role] = None
                continue
            text = template.decode(prompt.ids.tolist()).partition("followed")[0]
            rewritten = prompt.parent is None
            found[name][role] = None if rewritten else ("(gives way) " if prompt.drop else "") + text
    return found


def _boundary_lines(boundaries: Mapping[str, Mapping[str, str | None]]) -> list[str]:
    lines = ["after an answer that ended with, what is appended before the next message's words"]
    for stop, after in boundaries.items():
        lines.append(f"  {stop or 'nothing (cut by length)'}")
        for role, text in after.items():
            lines.append(f"    {role:<10} {'a new root, or refused' if text is None else repr(text)}")
    return lines


def _order_lines(proof: Proof) -> list[str]:
    """By kind of the last answer: the orders of each outcome."""
    table: dict[str, dict[str, list[Order]]] = {kind: defaultdict(list) for kind in KINDS}
    for order, counts in proof.outcomes.items():
        if well_formed(*order):
            table[order[0]][", ".join(sorted(counts))].append(order)
    lines = ["what happens to history, by the last answer and the roles appended to it"]
    for kind, outcomes in ((kind, found) for kind, found in table.items() if found):
        lines.append(f"  {kind}")
        for outcome, found in sorted(outcomes.items()):
            short = ["+".join(roles) or "nothing" for _, roles in found if len(roles) <= 1]
            longer = len(found) - len(short)
            shown = ", ".join([*short, *([f"{longer} longer orders"] if longer else [])])
            lines.append(f"    {outcome:<12} {shown}")
            for name in (REWRITES, LEFT_OUT, REFUSED):
                reason = next((proof.reasons[o, name] for o in found if (o, name) in proof.reasons), None)
                if name in outcome and reason:
                    lines.append(f"    {'':<12} {reason}")
    return lines


def _order(order: Order) -> str:
    kind, roles = order
    return f"{kind} answer, then {' + '.join(roles)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pacenote verify-template",
        description="Try a model's chat template on a CPU over all orders of roles: does history only grow?",
        epilog="exit status: 0 proven for the roles, 1 not, 2 bad input",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="directory with the tokenizer's files, or a model's name in the local hub cache")
    add("--family", default="auto", choices=["auto", *FAMILIES], help="chat template family")
    add("--roles", nargs="+", default=["tool"], choices=ROLES, metavar="ROLE",
        help=f"roles that agents may append, of {', '.join(ROLES)}")  # fmt: skip
    add("--template", type=Path, metavar="FILE", help="a chat template to use instead of the tokenizer's own")
    add("--trust-remote-code", action="store_true", help="run the code that the model brings for its tokenizer")
    add("--arguments", metavar="JSON", help="template arguments, as a request's chat_template_kwargs")
    add("--thinking", action=argparse.BooleanOptionalAction, default=True,
        help="try answers with thinking, too; a model that never thinks need not be proven for them")  # fmt: skip
    add("--examples", type=int, default=200, help="random conversations, besides every order of up to two roles")
    add("--seed", type=int, default=0, help="of the random conversations")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def verify_command(argv: Sequence[str]) -> int:
    """`pacenote verify-template`. Returns the exit code: 0 proven, 1 not, 2 for what the user can put right."""
    try:
        asked = _parser().parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    try:
        arguments = json.loads(asked.arguments) if asked.arguments else None
        if asked.examples < 0:
            raise ValueError(f"expected --examples of 0 or more, got {asked.examples}")
        template = Template.load(
            asked.model,
            family=asked.family,
            chat_template=asked.template,
            trust_remote_code=asked.trust_remote_code,
        )
        verdict = verify(
            template,
            roles=asked.roles,
            examples=asked.examples,
            seed=asked.seed,
            arguments=arguments,
            thinking=asked.thinking,
        )
    except json.JSONDecodeError as error:
        return _fail(f"expected --arguments as a JSON object: {error}")
    except (SessionError, ValueError) as error:
        return _fail(str(error))
    print(verdict.json() if asked.json else verdict.text())
    return 0 if verdict.proven else 1


def _fail(text: str) -> int:
    print(f"pacenote: {text}", file=sys.stderr)
    return 2
