import json

import pytest

from plait.text.settings import TokenizerSettings, read_settings

IDS = {"<s>": 1, "</s>": 2, "<pad>": 3, "<end>": 12}


def read(folder, **files):
    for name, content in files.items():
        suffix = ".jinja" if name == "chat_template" and isinstance(content, str) else ".json"
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}{suffix}").write_text(text)
    return read_settings(folder, IDS.get)


def test_an_empty_folder_gives_empty_settings(tmp_path):
    assert read(tmp_path) == TokenizerSettings()


def test_tokens_may_be_texts_or_objects(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    settings = read(tmp_path, tokenizer_config=config, special_tokens_map={"pad_token": "<pad>"})
    assert (settings.bos_id, settings.eos_ids, settings.pad_id) == (1, (2,), 3)


def test_stop_ids_of_generation_join_the_tokenizers_own(tmp_path):
    files = {"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [12, 2, 11]}}
    assert read(tmp_path, **files).eos_ids == (2, 12, 11)


def test_the_models_config_is_asked_only_where_the_others_are_silent(tmp_path):
    assert read(tmp_path, config={"eos_token_id": 7, "bos_token_id": 8}).eos_ids == (7,)
    settings = read(tmp_path, tokenizer_config={"eos_token": "</s>", "bos_token": "<s>"})
    assert (settings.bos_id, settings.eos_ids) == (1, (2,))


def test_a_token_that_the_vocabulary_lacks_is_not_set(tmp_path):
    assert read(tmp_path, tokenizer_config={"bos_token": "<unheard>"}).bos_id is None


def test_the_template_file_wins_over_the_one_in_the_config(tmp_path):
    assert read(tmp_path, tokenizer_config={"chat_template": "config"}).chat_template == "config"
    assert read(tmp_path, chat_template="file").chat_template == "file"


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert read(tmp_path, tokenizer_config={"chat_template": named}).chat_template == "plain"


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer_config": "{"}, "tokenizer_config.json is not readable JSON"),
        ({"config": []}, "config.json holds a list"),
        ({"tokenizer_config": {"eos_token": 3}}, "eos_token = 3 is not a token"),
        ({"generation_config": {"eos_token_id": ["2"]}}, "eos_token_id = .'2'. is not an id"),
        ({"generation_config": {"eos_token_id": True}}, "eos_token_id = True"),
        ({"config": {"bos_token_id": -1}}, "bos_token_id = -1"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template is a int"),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_field(tmp_path, files, named):
    with pytest.raises(ValueError, match=named):
        read(tmp_path, **files)
