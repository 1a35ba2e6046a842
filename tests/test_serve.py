"""`dllm serve` against OpenAI's own client: what `dllm.generate` gives alone, streamed or not, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import math
import re
from types import SimpleNamespace

import jsonschema
import openai
import pytest
from serve_kit import CHAT, MESSAGES, PROMPT, TEXT, serving

import dllm
from dllm.call.output import Event
from dllm.decoding.stopping import Stops
from dllm.decoding.trace import Trace
from dllm.serve.answers import Choice
from dllm.serve.config import ServeConfig
from dllm.serve.requests import completion
from dllm.serve.schema import Completion
from dllm.serve.tools import Splitter, Template, Tools


@pytest.fixture(scope="module")
def model():
    return dllm.load("tiny")


@pytest.fixture(scope="module")
def site(model):
    with serving(dllm.Engine(model), ServeConfig(draft_seconds=0, defaults={"sampler": "threshold"})) as site:
        yield site


def streamed(site, body):
    """The chunks of a stream, and the text of its choices, by index."""
    events = site.events(TEXT if "prompt" in body else CHAT, body)
    assert events[-1] == ("", "[DONE]")
    chunks, texts = [json.loads(data) for _, data in events[:-1]], {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text = choice["text"] if "prompt" in body else choice["delta"].get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return chunks, texts


ALIKE = {"temperature": 1.5, "seed": 5, "top_p": 0.8, "top_k": 4}
CACHED = {"sampler": "klass", "cache": "dual", "block_length": 8}
FIELDS = [  # of a request, and the arguments of `generate` that they stand for
    ({}, {}),
    ({"max_completion_tokens": 20}, {"max_new_tokens": 20}),
    ({"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "seed": 5}),
    (ALIKE, ALIKE),
    ({"stop": ["####", "zebra"]}, {"stop": ["####", "zebra"]}),
    ({"stop": " = "}, {"stop": " = "}),
    (CACHED, CACHED),
    ({"sampler": {"name": "wino", "tau_verify": 0.8}}, {"sampler": {"name": "wino", "tau_verify": 0.8}}),
    ({"sampler": "confidence", "steps": 12}, {"sampler": "confidence", "steps": 12}),
    ({"cfg_scale": 0.5, "min_new_tokens": 20}, {"cfg_scale": 0.5, "min_new_tokens": 20}),
    ({"lookahead": "2:mode=fast", "sampler": "confidence"}, {"lookahead": "2:mode=fast", "sampler": "confidence"}),
    ({"max_nfe": 3}, {"max_nfe": 3}),
    ({"regex": "[0-9]+ apples"}, {"regex": "[0-9]+ apples"}),
    ({"choices": ["19", "20"]}, {"choices": ["19", "20"]}),
    ({"constraint": {"regex": "a+"}, "batch": "alone"}, {"regex": "a+"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "arguments"), FIELDS, ids=lambda given: ",".join(given) if isinstance(given, dict) else ""
)
def test_a_request_gives_what_generate_gives_alone_streamed_or_not(site, model, extra, arguments):
    known = {"max_completion_tokens", "temperature", "seed", "top_p", "stop"}
    own = {name: value for name, value in extra.items() if name in known}
    more = {name: value for name, value in extra.items() if name not in known}
    size = {} if "max_completion_tokens" in own else {"max_tokens": 32}
    want = dllm.generate(model, MESSAGES, **{"sampler": "threshold", "max_new_tokens": 32, **arguments})
    got = site.client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=more, **size, **own)
    (choice,) = got.choices
    said = choice.model_extra["dllm"]
    assert choice.message.content == want.text and choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if want.finish_reason == "stop" else "length")
    assert (said["nfe"], said["finish"], said["sampler"]) == (want.nfe, want.finish_reason, want.sampler)
    assert got.usage.completion_tokens == len(want.tokens)
    assert got.usage.prompt_tokens == len(model.chat(MESSAGES))
    chunks, texts = streamed(site, {"messages": MESSAGES, **size, **extra})
    assert texts == {0: want.text}
    assert sum(chunk.get("dllm", {}).get("tokens", 0) for chunk in chunks) == len(want.tokens)


@pytest.mark.parametrize("prompt", ["Tom has", ["Tom has", "He buys"], "ids", "several"])
def test_completions_take_texts_and_ids_one_block_of_choices_a_prompt(site, model, prompt):
    encoded = [list(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("Tom has", "He buys")]
    prompt = {"ids": encoded[0], "several": encoded}.get(prompt, prompt) if isinstance(prompt, str) else prompt
    asked = {"prompt": prompt, "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 10}
    want = dllm.generate(
        model, prompt, n=2, temperature=1.0, seed=3, max_new_tokens=10, sampler="threshold", chat=False
    )
    got = site.client.completions.create(model="tiny", **asked)
    assert [c.text for c in got.choices] == [w.text for w in want]
    assert [c.index for c in got.choices] == list(range(len(want)))
    assert [c.model_extra["dllm"]["seed"] for c in got.choices] == [3 + i for i in range(len(want))]
    assert streamed(site, asked)[1] == {i: w.text for i, w in enumerate(want)}
    prompts = encoded if len(want) == 4 else encoded[:1]
    assert got.usage.prompt_tokens == sum(map(len, prompts))
    assert got.usage.completion_tokens == sum(len(w.tokens) for w in want)


def test_a_seed_that_nobody_gave_is_told_and_repeats_the_answer(site):
    asked = {"messages": MESSAGES, "temperature": 1.5, "max_tokens": 24}
    first = site.post(CHAT, asked).json()["choices"][0]
    again = site.post(CHAT, {**asked, "seed": first["dllm"]["seed"]}).json()["choices"][0]
    assert again["message"] == first["message"]


def test_echo_puts_the_prompt_in_front(site):
    asked = {"prompt": PROMPT, "echo": True, "max_tokens": 8, "logprobs": 0}
    got = site.client.completions.create(model="tiny", **asked).choices[0]
    assert got.text.startswith(PROMPT)
    assert got.logprobs.text_offset[:1] in ([], [len(PROMPT)])
    assert streamed(site, asked)[1] == {0: got.text}
    assert site.post(TEXT, {"prompt": [-1], "echo": True}).json()["error"]["code"] == "invalid_value"


def test_a_suffix_stands_behind_what_is_written(site, model):
    before, behind = f"{PROMPT}<|sep|>Tom has", " apples."
    ids = [list(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (before, behind)]
    want = dllm.generate(model, ids[0] + [model.mask_id] * 5 + ids[1], infill=True, sampler="threshold")
    asked = {"prompt": before, "suffix": behind, "max_tokens": 5}
    got = site.client.completions.create(model="tiny", **asked)
    assert got.choices[0].text == model.tokenizer.decode(want.tokens) == " 12 + 7 = 19"
    assert got.usage.prompt_tokens == sum(map(len, ids)) and got.usage.completion_tokens == 5
    assert streamed(site, asked)[1] == {0: got.choices[0].text}


@pytest.mark.parametrize("given", ["chat", "hole"])
def test_a_stop_string_inside_of_a_token_cuts_a_text_that_is_read_from_the_ids(given):
    tokenizer, chat = dllm.load("tiny").tokenizer, given == "chat"
    before = [] if chat else tokenizer("Tom has", add_special_tokens=False)["input_ids"]
    ids = tokenizer("He buys 7 apples." if chat else " 12 apples.", add_special_tokens=False)["input_ids"]
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
        ids = [*tokenizer("<think></think>", add_special_tokens=False)["input_ids"], *ids]
    stops = Stops.of((), "uys" if chat else "ples", tokenizer)
    asked = SimpleNamespace(chat=chat, holes=not chat)
    splitter = Splitter.of(None, tokenizer) if chat else None
    texts = set()
    for live in (False, True):
        choice, cut = Choice(asked, 0, tokenizer, splitter=splitter, before=before), stops.cut([*before, *ids])
        heard, told, new = "", len(before), []
        for n in range(1, len(ids) + 1) if live else ():
            text = stops.settled([*before, *ids[:n]])
            count = max(told, stops.reach([*before, *ids[:n]], len(text)))
            new += choice.feed(Event(0, text[len(heard) :], None, n, None, [*before, *ids][told:count]), 0.0)[0]
            heard, told = text, count
        output = SimpleNamespace(tokens=cut.tokens)
        new += choice.feed(Event(0, cut.text[len(heard) :], None, 9, output, cut.tokens[told:]), 0.0)[0]
        texts.add("".join(one["content"] if chat else one for one in new))
    assert texts == {"He b" if chat else " 12 ap"}


def test_a_hole_is_as_wide_as_the_server_says_where_the_request_says_nothing(site):
    prompt, config = f"{PROMPT}<|sep|>Tom has", ServeConfig(defaults={"max_new_tokens": 5, "seed": 7})
    asked = completion(Completion(prompt=prompt, suffix=" apples."), site.app.state.serving.backend, config)
    assert asked.prompt[0].count(site.backend.model.mask_id) == 5
    assert asked.arguments["seed"] == 7


def test_infill_returns_the_whole_text(site, model):
    prompt = f"{PROMPT}<|sep|>Tom has<|mask|><|mask|><|mask|> = 19 apples."
    want = dllm.generate(model, prompt, infill=True, chat=False, sampler="threshold")
    asked = {"prompt": prompt, "infill": True}
    assert site.post(TEXT, asked).json()["choices"][0]["text"] == want.text
    assert streamed(site, asked)[1] == {0: want.text}


def test_logprobs_are_those_of_generate(site, model):
    want = dllm.generate(model, MESSAGES, logprobs=2, max_new_tokens=24, sampler="threshold")
    got = site.client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=24
    )
    said = got.choices[0].logprobs.content
    assert [s.logprob for s in said] == pytest.approx([w.logprob for w in want.logprobs], abs=1e-5)
    assert "".join(s.token for s in said) == want.text
    assert [[t.logprob for t in s.top_logprobs] for s in said] == [
        pytest.approx([p for _, p in w.top], abs=1e-4) for w in want.logprobs
    ]
    assert bytes(said[0].bytes).decode() == said[0].token
    chunks, _ = streamed(site, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 24})
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [e["token"] for part in parts for e in part["content"]] == [s.token for s in said]
    text = site.client.completions.create(model="tiny", prompt=PROMPT, logprobs=1, max_tokens=6, seed=1).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) == len(text.logprobs.top_logprobs)
    assert not said[0].model_extra
    bound = site.client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, max_tokens=8, extra_body={"regex": "[A-C]x"}
    )
    second = bound.choices[0].logprobs.content[1]
    assert second.dllm["constrained_logprob"] == pytest.approx(0, abs=1e-6) and second.logprob < -1e-3


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def test_a_json_schema_binds_the_answer(site):
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        got = site.client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format=form, max_tokens=24, seed=seed, temperature=1.0
        )
        jsonschema.validate(json.loads(got.choices[0].message.content), SCHEMA)


def test_json_object_is_any_object(site):
    got = site.client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=24
    )
    assert isinstance(json.loads(got.choices[0].message.content), dict)


TOOLS = [
    {"type": "function", "function": {"name": "buy", "description": "Buys apples.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "buy"}}], ids=["any", "one"])
def test_a_required_tool_is_called_with_arguments_of_its_schema(site, choice):
    got = site.client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=48, seed=0,
        extra_body={"block_length": 8},
    )  # fmt: skip
    (call,) = got.choices[0].message.tool_calls
    assert got.choices[0].finish_reason == "tool_calls" and got.choices[0].message.content is None
    schema = SCHEMA if call.function.name == "buy" else {"type": "object"}
    jsonschema.validate(json.loads(call.function.arguments), schema)
    assert choice == "required" or call.function.name == "buy"
    parts = site.client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=48, seed=0, stream=True,
        extra_body={"block_length": 8},
    )  # fmt: skip
    deltas = [(d, chunk.dllm["step"]) for chunk in parts for d in chunk.choices[0].delta.tool_calls or []]
    first, more = deltas[0][0], deltas[1:]
    assert first.id and first.function.name == call.function.name and first.function.arguments == ""
    assert all((d.index, d.id, d.function.name) == (0, None, None) for d, _ in more)
    assert "".join(d.function.arguments for d, _ in more) == call.function.arguments
    if call.function.name == "buy":  # they come while later ones are decoded
        assert more[0][1] < more[-1][1]
    again = [*MESSAGES, got.choices[0].message.model_dump(exclude_none=True)]
    again.append({"role": "tool", "tool_call_id": call.id, "content": "19"})
    assert site.client.chat.completions.create(model="tiny", messages=again, max_tokens=8).choices


def test_tools_of_a_model_that_knows_none_are_refused_unless_the_answer_is_bound(site):
    with pytest.raises(openai.BadRequestError, match="knows no tool calls"):
        site.client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)
    free = site.client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=4
    )
    assert free.choices[0].message.tool_calls is None


QWEN = (
    "{% if tools %}You may call {{ tools | tojson }} in <tool_call> marks.{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|sep|>{% endfor %}"
)


def test_a_template_with_tools_is_told_of_them_and_the_call_begins_behind_its_mark(site, model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", QWEN)
    asked = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 48, "seed": 0}
    plain = site.client.chat.completions.create(**{**asked, "tool_choice": "none"}).usage.prompt_tokens
    told = site.client.chat.completions.create(**asked).usage.prompt_tokens
    bound = site.client.chat.completions.create(**asked, tool_choice="required")
    assert told > plain + 20
    mark = model.tokenizer("<tool_call>\n", add_special_tokens=False)["input_ids"]
    assert bound.usage.prompt_tokens == told + len(mark)
    assert bound.choices[0].message.tool_calls


CALL = '<tool_call>\n{"name": "buy", "arguments": {"n": 7}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("plain < text", {"content": "plain < text"}),
        (f"Yes.{CALL}", {"content": "Yes.", "call": "buy", "arguments": '{"n": 7}'}),
        (f"{CALL}{CALL}", {"call": "buybuy", "arguments": '{"n": 7}{"n": 7}'}),
        ("<tool_call>no JSON</tool_call>.", {"content": "<tool_call>no JSON</tool_call>."}),
        ('<tool_call>{"name": "other", "arguments": {}}', {"content": '<tool_call>{"name": "other", "arguments": {}}'}),
        ("<think>hm <</think>19", {"reasoning": "hm <", "content": "19"}),
        ("a<tool", {"content": "a<tool"}),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_answer_is_split_alike_however_it_comes(text, kinds, size):
    tools = Tools({"buy": SCHEMA}, TOOLS, False, True, Template(True, True))
    splitter, found = Splitter(tools, thinks=True), {}
    for at in range(0, len(text), size):
        for piece in splitter.feed(text[at : at + size], end=at + size >= len(text)):
            found[piece.kind] = found.get(piece.kind, "") + piece.text
    assert found == kinds


def test_one_call_where_parallel_ones_are_not_wanted():
    splitter = Splitter(Tools({"buy": SCHEMA}, TOOLS, False, False, Template(True, True)), thinks=False)
    assert [piece.kind for piece in splitter.feed(CALL + CALL, end=True)] == ["call", "arguments"]


BOUND = [
    ('{"name": "buy", "arguments": {"n": 7}}', ["{", '"n": 7']),
    ('{"name":"buy","arguments":{"a": {"b}": "} }"}, "c": [{}]} }', ["{", '"c"']),
    ('{"name": "buy", "arguments": {}}', []),
    ("no call", []),
]


@pytest.mark.parametrize(("text", "early"), BOUND)
@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("cut", [False, True])
def test_arguments_of_a_call_that_an_answer_is_bound_to_come_as_they_are_final(text, early, size, cut):
    """Where a stop string may cut the answer, only its end shows a call."""
    splitter, found, before = (
        Splitter(Tools({"buy": SCHEMA}, TOOLS, True, True, Template(True, True)), False, cut),
        {},
        "",
    )
    for at in range(0, len(text), size):
        end = at + size >= len(text)
        for piece in splitter.feed(text[at : at + size], end):
            found[piece.kind] = found.get(piece.kind, "") + piece.text
        before = before if end else found.get("arguments", "")
    if text == "no call":
        assert found == {"content": text}
        return
    assert list(found) == ["call", "arguments"] and found["call"] == "buy"
    assert json.loads(found["arguments"]) == json.loads(text)["arguments"]
    assert all((part in before) == (size < 1000 and not cut) for part in early)


def test_a_stream_says_text_while_it_is_decoded_and_ends_with_its_usage(site):
    asked = {"messages": MESSAGES, "sampler": "confidence", "block_length": 8, "max_tokens": 32}
    chunks, _ = streamed(site, {**asked, "stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [c for c in chunks if c["choices"] and c["choices"][0]["delta"].get("content")]
    final = next(c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["finish_reason"])
    assert texts[0]["dllm"]["step"] < final["dllm"]["nfe"]
    assert [c["dllm"]["t"] for c in texts] == sorted(c["dllm"]["t"] for c in texts)
    last = chunks[-1]
    assert last["choices"] == [] and last["usage"]["total_tokens"] > last["usage"]["completion_tokens"] > 0
    assert all(c["usage"] is None for c in chunks[:-1])
    timeline = last["dllm"]["timeline"]
    assert 0 < timeline["first_forward"] <= timeline["first_text"] <= timeline["last_text"]
    assert timeline["blocks"] >= 1 and timeline["chunks"] == len(texts)


def test_draft_events_are_the_trace(site, model):
    events = site.events(CHAT, {"messages": MESSAGES, "max_tokens": 24, "draft": True, "seed": 0, "return_trace": True})
    drafts = [json.loads(data) for name, data in events if name == "draft"]
    assert all(d["choices"][0]["delta"] == {} and d["choices"][0]["finish_reason"] is None for d in drafts)
    start, *steps, end = [d["dllm"] for d in drafts]
    assert (start["kind"], {s["kind"] for s in steps}, end["kind"]) == ("start", {"draft"}, "end")
    want = dllm.generate(model, MESSAGES, max_new_tokens=24, seed=0, sampler="threshold", trace=True).trace
    first = len(want.prompt)
    told = [[column + first, token] for s in steps for column, token, *_ in s["writes"]]
    assert sorted(told) == sorted(pair for pairs in want.commits for pair in pairs)
    assert steps[-1]["step"] == len(want.commits) == steps[-1]["nfe"] == end["nfe"]
    assert start["length"] == 24 == steps[0]["length"] and start["prompt_tokens"] == first
    assert steps[0]["window"] == [0, 24] and all(s["ms"] > 0 for s in steps)
    assert [s["final"] for s in steps] == sorted(s["final"] for s in steps)
    pieces = [want.piece(t) for pairs in want.commits for _, t in pairs]
    assert sorted(w[2] for s in steps for w in s["writes"]) == sorted(pieces)
    closing = next(c for _, data in events[:-1] if (c := json.loads(data))["choices"][0]["finish_reason"])
    kept = Trace(**{**closing["choices"][0]["dllm"]["trace"], "pieces": {}})
    assert kept.commits == want.commits and "on_step" not in kept.arguments
    assert (start["prompt"], start["start"]) == (want.prompt, first)
    assert set(steps[0]) == {
        "kind", "choice", "step", "nfe", "window", "length", "final", "writes", "masked_again", "ms"
    }  # fmt: skip


def test_drafts_of_a_bound_answer_have_the_posterior(site, model):
    events = site.events(CHAT, {"messages": MESSAGES, "max_tokens": 8, "draft": True, "seed": 0, "regex": "[A-C]x"})
    writes = [w for name, data in events if name == "draft" for w in json.loads(data)["dllm"].get("writes", ())]
    want = dllm.generate(model, MESSAGES, max_new_tokens=8, seed=0, sampler="threshold", regex="[A-C]x", logprobs=0)
    said = {column: (sure, bound) for column, _, _, sure, bound in writes}
    for column, token in enumerate(want.logprobs):
        assert said[column] == pytest.approx((math.exp(token.logprob), math.exp(token.constrained)), abs=1e-5)


def test_the_official_client_reads_drafts_and_many_streams_at_once(site, model):
    client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)

    async def one(seed):
        parts = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, seed=seed, temperature=1.0, max_tokens=24,
            extra_body={"draft": seed % 2 == 0},
        )  # fmt: skip
        return "".join([c.choices[0].delta.content or "" async for c in parts])

    async def every():
        return await asyncio.gather(*map(one, range(6)))

    want = [
        dllm.generate(model, MESSAGES, seed=s, temperature=1.0, max_new_tokens=24, sampler="threshold").text
        for s in range(6)
    ]
    assert asyncio.run(every()) == want


def test_reads_are_those_of_dllm_read(site, model):
    asked = {"prompt": PROMPT, "template": "{n} apples", "slots": {"n": ["12", "19"]}}
    want = dllm.read(model, asked["prompt"], asked["template"], slots=asked["slots"])["n"]
    got = site.post("/v1/reads", asked).json()["slots"]["n"]
    assert got["best"] == want.best and got["logp"] == pytest.approx(want.logp)
    for odd in ({"slots": {}}, {"slots": {"n": "12"}}, {"prompt": ["a", "b"]}, {"stages": ["n"]}, {"template": "{m}"}):
        assert site.post("/v1/reads", {**asked, **odd}).json()["error"]["code"] == "invalid_value"


def test_models_say_what_is_served(site):
    (entry,) = site.client.models.list().data
    assert entry.id == "tiny" == site.client.models.retrieve("tiny").id
    said = entry.model_extra["dllm"]
    assert said["family"] == "llada" and "klass" in said["samplers"] and said["defaults"]["sampler"] == "threshold"
    assert said["limits"]["max_n"] == 16
    with pytest.raises(openai.NotFoundError):
        site.client.models.retrieve("another")


def ask(**body):
    return {"messages": MESSAGES, "max_tokens": 4, **body}


REFUSED = [  # body, status, code, param
    (ask(model="gpt"), 404, "model_not_found", "model"),
    (ask(tempereture=1), 400, "unknown_parameter", "tempereture"),
    (ask(temperature=-1), 400, "invalid_value", "temperature"),
    (ask(temperature="warm"), 400, "invalid_value", "temperature"),
    (ask(top_p=0), 400, "invalid_value", "top_p"),
    (ask(n=17), 400, "invalid_value", "n"),
    (ask(stop=["a"] * 5), 400, "invalid_value", "stop"),
    (ask(stop="a" * 300), 400, "invalid_value", "stop"),
    (ask(stop=[""]), 400, "invalid_value", "stop"),
    (ask(seed=1 << 70), 400, "invalid_value", "seed"),
    (ask(max_tokens=600), 400, "context_length_exceeded", "max_tokens"),
    (ask(sampler="klas"), 400, "invalid_value", "sampler"),
    (ask(sampler="pc:frequencies=/etc/passwd"), 400, "unsupported", "sampler"),
    (ask(sampler="learn2pd:filter=a.pth"), 400, "unsupported", "sampler"),
    (ask(cache="dula"), 400, "invalid_value", "cache"),
    (ask(regex="[a-z]{40}"), 400, "constraint_unsatisfiable", "max_tokens"),
    (ask(regex="("), 400, "invalid_value", "regex"),
    (ask(regex="a" * 5000), 400, "constraint_too_large", "regex"),
    (ask(regex="a", stop="b"), 400, "invalid_value", "stop"),
    (ask(regex="a", choices=["b"]), 400, "invalid_value", "regex"),
    (ask(top_logprobs=3), 400, "invalid_value", "top_logprobs"),
    (ask(draft=True), 400, "invalid_value", "draft"),
    (ask(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
    (ask(response_format={"type": "xml"}), 400, "invalid_value", "response_format"),
    (
        ask(response_format={"type": "json_schema", "json_schema": {"schema": {"minimum": 1}}}),
        400,
        "invalid_value",
        "response_format",
    ),
    (ask(sampler="klass+wino"), 400, "invalid_value", "sampler"),  # the message speaks of samplers
    (ask(tools=[{"type": "web"}]), 400, "invalid_value", "tools"),
    (
        ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}}),
        400,
        "invalid_value",
        "tool_choice",
    ),
    (ask(frequency_penalty=1.0), 400, "unsupported", "frequency_penalty"),
    (ask(logit_bias={"5": 1}), 400, "unsupported", "logit_bias"),
    (ask(functions=[{}]), 400, "unsupported", "functions"),
    ({}, 400, "missing_required_parameter", "messages"),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_value", None),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), REFUSED)
def test_what_cannot_be_honoured_is_refused_before_the_first_forward(site, body, status, code, param):
    answer = site.post(CHAT, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert param is None or error["param"] == param
    assert error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("field", ["frequency_penalty", "presence_penalty", "service_tier", "user", "metadata"])
def test_fields_that_say_nothing_are_taken(site, field):
    value = {"service_tier": "auto", "user": "me", "metadata": {"a": "b"}}.get(field, 0.0)
    assert site.post(CHAT, ask(**{field: value})).status_code == 200


PAGE = {"body": b"{", "none": b"", "list": b"[]", "nan": b'{"seed": NaN}', "utf8": b'{"user": "\xff"}',
        "deep": b"[" * 100_000, "digits": b'{"seed": ' + b"9" * 10_000 + b"}"}  # fmt: skip


@pytest.mark.parametrize("body", PAGE.values(), ids=PAGE)
def test_a_body_that_is_no_object_is_refused(site, body):
    answer = site.post(CHAT, body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] in ("invalid_json", "invalid_value")


def test_paths_and_methods_that_are_none_have_errors_of_the_same_shape(site):
    assert site.post("/v1/nothing", {}).json()["error"]["code"] == "not_found"
    answer = site.post("/v1/models", {})
    assert answer.status_code == 405 and answer.json()["error"]["code"] == "method_not_allowed"


def test_a_parts_list_is_its_text(site):
    parts = [{"type": "text", "text": PROMPT[:10]}, {"type": "text", "text": PROMPT[10:]}]
    one, other = (
        site.post(CHAT, {"messages": [{"role": "user", "content": c}], "max_tokens": 24}).json()
        for c in (PROMPT, parts)
    )
    assert one["choices"][0]["message"] == other["choices"][0]["message"]


def test_request_ids_are_the_clients_or_ours(site):
    assert site.post(CHAT, ask(), headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert re.fullmatch(r"req-\w{16}", site.post(CHAT, ask()).headers["x-request-id"])
