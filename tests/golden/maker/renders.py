"""Chat-template renderings by transformers: expected/<model>/templates.json."""
import jinja2
from transformers import AutoTokenizer

from .data import encode_turns, render
from .expected import write_json

SYSTEM = {"role": "system", "content": "You are a careful assistant."}
USER = {"role": "user", "content": "  What is a program? "}  # the white space tells who trims
ANSWER = {"role": "assistant", "content": "A list of steps.\n"}
AGAIN = {"role": "user", "content": "Say it in “Español” & <b>louder</b> 🙂"}
THOUGHT = {"role": "assistant", "content": "<think>\nThey want Spanish.\n</think>\n\nUna lista de pasos."}
TOOL_ANSWER = {"role": "tool", "content": "{\"steps\": 3}"}
TOOL = {"type": "function", "function": {"name": "count_steps", "description": "Counts <steps> & returns a number",
                                         "parameters": {"type": "object", "properties": {"program": {"type": "string"}}}}}

# name -> (messages, options of apply_chat_template)
CASES = {
    "user": ([USER], {}),
    "user, generation prompt": ([USER], dict(add_generation_prompt=True)),
    "system": ([SYSTEM, USER], dict(add_generation_prompt=True)),
    "one turn": ([USER, ANSWER], {}),
    "two turns": ([USER, ANSWER, AGAIN], dict(add_generation_prompt=True)),
    "two turns, system, answered": ([SYSTEM, USER, ANSWER, AGAIN, ANSWER], {}),
    "thought last": ([USER, ANSWER, AGAIN, THOUGHT], {}),
    "thought in the past": ([USER, THOUGHT, AGAIN], dict(add_generation_prompt=True)),
    "no thinking": ([USER], dict(add_generation_prompt=True, enable_thinking=False)),
    "tool": ([SYSTEM, USER, ANSWER, TOOL_ANSWER], dict(add_generation_prompt=True, tools=[TOOL])),
    "two users": ([USER, AGAIN], {}),
}


def write(root, name, turns):
    """templates.json: {renders: [case], conversations: [rendering of each row of turns.jsonl]}

    `turns_agree`: every turn rendered with the conversation up to it is a prefix of the whole rendering, so one pass
    over the whole can train all turns. `assistant_mask`: of a template with `generation` tags, per token of `ids`."""
    tok = AutoTokenizer.from_pretrained(root / "models" / name)
    renders = []
    for case, (messages, options) in CASES.items():
        entry = dict(name=case, messages=messages, **{"add_generation_prompt": False, **options})
        try:
            entry["text"] = tok.apply_chat_template(messages, tokenize=False, **options)
            entry["ids"] = render(tok, messages, **options)
        except jinja2.exceptions.TemplateError as error:
            entry["error"] = str(error)
        renders.append(entry)
    conversations = []
    for row in turns:
        entry = dict(text=tok.apply_chat_template(row["messages"], tokenize=False), ids=render(tok, row["messages"]))
        entry["turns_agree"] = all(entry["ids"][:len(r.prompt_ids + r.ids)] == r.prompt_ids + r.ids
                                   for r in encode_turns(tok, row))
        if "{%- generation" in tok.chat_template:
            entry["assistant_mask"] = list(tok.apply_chat_template(
                row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"])
        conversations.append(entry)
    write_json(root / "expected" / name / "templates.json", dict(renders=renders, conversations=conversations))
