"""Rows of the committed data files, brought to one shape, and TRL's rule for turning them into token ids."""
import json
from dataclasses import dataclass

FILES = ["demos", "scores", "labels", "pairs", "turns"]


@dataclass
class Response:
    """One response with its prompt, as token ids; `key` names the column it came from."""
    key: str
    prompt_ids: list
    ids: list


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def read_all(folder):
    """{file name: rows} of the five data files."""
    return {name: read_jsonl(folder / f"{name}.jsonl") for name in FILES}


def with_prompt(row):
    """A `messages` row as prompt and completion (its last message); other rows unchanged."""
    if "messages" not in row:
        return row
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def response_keys(row):
    """The response columns of a row of any format."""
    row = with_prompt(row)
    return [k for k in ("completion", "response", "chosen", "rejected") if k in row]


def render(tok, text, **options):
    """Token ids of a message list (by the chat template) or of a string (with what the tokenizer adds: BOS)."""
    if isinstance(text, list):
        return list(tok.apply_chat_template(text, tokenize=True, return_dict=True, **options)["input_ids"])
    return list(tok(text=text)["input_ids"])


def encode(tok, row):
    """The responses of a row, as TRL's SFT, DPO and KTO trainers tokenise it.

    Conversational: the prompt is rendered with the generation prompt, prompt + response without it. Strings: EOS is
    appended to a response which does not end with it, and the *concatenation* is tokenised. Either way the response
    is what follows the prompt's tokens. `messages`: the last message is the response. TRL moves the border back to the common prefix when the prompt is not a
    prefix; the data here never needs that, and this asserts it."""
    row, out = with_prompt(row), []
    for key in response_keys(row):
        prompt, response = row["prompt"], row[key]
        if isinstance(prompt, list):
            prompt_ids = render(tok, prompt, add_generation_prompt=True)
        else:
            prompt_ids = render(tok, prompt)
            response = response if response.endswith(tok.eos_token) else response + tok.eos_token
        full = render(tok, prompt + response)
        n = len(prompt_ids)
        assert full[:n] == prompt_ids and len(full) > n, ("the prompt is not a prefix", row)
        out.append(Response(key, prompt_ids, full[n:]))
    return out


def encode_turns(tok, row):
    """Every assistant turn of a `messages` row as one response to all that came before it; other rows as `encode`."""
    if "messages" not in row:
        return encode(tok, row)
    messages = row["messages"]
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return [encode(tok, {"messages": messages[:i + 1]})[0] for i in ends]
