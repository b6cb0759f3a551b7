"""Names of the Hugging Face hub, `owner/name` or `owner/name@revision`, in a folder's place.

The package huggingface_hub fetches the files, shows how far it is, and keeps them in its cache.
Only what is read here is fetched: config.json, the tokenizer's file, our align_vocab.json and
safetensors, and before gigabytes of these, whether they can be used. HF_ENDPOINT, HF_HOME, HF_TOKEN
and HF_HUB_OFFLINE mean what they mean there.
"""
import functools
import os
import re
import sys
from pathlib import Path

from plumbing.settings import InputError, Settings, read_json
from plumbing.tokenizers import BytePairs

NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@functools.cache        # a process asks once: all of it has the same commit
def hub_folder(name: str, weights: bool = True) -> Path:
    """The hub's model of that name -> the folder of its files in the cache.

    weights: whether they are wanted; else only config.json is fetched. Anything that is no such
    name is a path and comes back as it is; whoever opens it will say what is missing. Raises
    InputError, one line, where a name leads to nothing that can be read.
    """
    match = NAME.fullmatch(name)
    if not match:
        return Path(name)
    repository, revision = match.groups()
    owner = repository.split("/")[0]
    if revision is None and os.path.isdir(owner):
        raise InputError(f"{name}: no such folder; {owner}/ is one, so this was not looked up on "
                         f"the hub: {name}@main would be")
    try:
        from huggingface_hub import constants, utils
    except ImportError:
        raise InputError(f"{name}: no such folder; to take a model of that name from the hub, "
                         "`pip install huggingface_hub`") from None
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first_here:          # torchrun's others wait at the package's locks
        utils.disable_progress_bars()
    folder = Repository(name, repository, revision, constants.ENDPOINT).fetch(weights)
    if first_here:
        print(f"{name}: {folder}, from the hub", file=sys.stderr)
    return folder


class Repository:
    """A model on the hub at `url`, of one commit from its first file on."""

    def __init__(self, name: str, repository: str, revision: str | None, url: str):
        self.name, self.repository, self.url = name, repository, url
        self.revision, self.wanted = revision, revision
        self.folder: Path | None = None         # in the cache

    def fetch(self, weights: bool) -> Path:
        """Every file that is read, the small ones first, or config.json alone. Raises InputError.
        """
        if not self.first_of("config.json"):
            raise self.error("has no config.json of it: these are no weights in the hub's format")
        settings = Settings(self.folder / "config.json")
        kind = settings.model_type("llama", "siglip", "siglip_vision_model", "alignvlm")
        if not weights:
            return self.folder
        is_new = not self.there(WEIGHTS, INDEX)
        if not kind.startswith("siglip"):
            tokenizer = self.first_of("tokenizer.json", "tokenizer.model")
            if tokenizer and is_new:
                BytePairs(self.folder / tokenizer)      # raises, before the weights are fetched
        file = self.first_of(WEIGHTS, INDEX)
        if not file:
            raise self.error("has it without model.safetensors: no other weights are read")
        if kind == "alignvlm" and is_new:
            self.first_of("align_vocab.json")           # few models have one
        if file == INDEX:
            places = read_json(self.folder / INDEX).get("weight_map")
            # What is wrong with an index, plumbing/weights.py says.
            for shard in sorted(set(places.values())) if isinstance(places, dict) else []:
                self.first_of(str(shard))
        return self.folder

    def there(self, *files: str) -> list[str]:
        """Those of the files that the cache has."""
        return [file for file in files if self.folder and (self.folder / file).exists()]

    def first_of(self, *files: str) -> str | None:
        """The first file that the cache has, or else that the hub has, which is fetched then; None
        if neither has any. Raises InputError."""
        for file in self.there(*files) or files:
            if self.download(file):
                return file
        return None

    def download(self, file: str) -> bool:
        """Have a file in the cache; False if the hub does not have it. Raises InputError."""
        from huggingface_hub import errors, hf_hub_download
        try:
            path = hf_hub_download(self.repository, file, revision=self.revision)
        except errors.LocalEntryNotFoundError as error:
            raise self.unreached(file, error.__cause__ or error) from None
        except errors.EntryNotFoundError:
            return False
        except errors.GatedRepoError:
            raise self.error("gives it to those who have accepted its terms: do so at "
                             f"{self.url}/{self.repository}, then `hf auth login`") from None
        except errors.RevisionNotFoundError:
            raise self.error(f"has no revision {self.wanted!r} of it") from None
        except errors.RepositoryNotFoundError:
            raise self.error("has no model of that name, or a private one, for which there is "
                             "`hf auth login`") from None
        except errors.HFValidationError:
            raise InputError(f"{self.name}: no such folder, and no name that the hub can "
                             "have") from None
        except Exception as error:      # its network packages' own, which differ between versions
            raise InputError(f"{self.name}: {file} did not arrive ({one_line(error)}): the same "
                             "command goes on") from None
        self.folder = self.folder or Path(path).parent
        self.revision = self.folder.name        # .../snapshots/COMMIT
        return True

    def error(self, what: str) -> InputError:
        return InputError(f"{self.name}: no such folder, and {self.url} {what}")

    def unreached(self, file: str, why: BaseException) -> InputError:
        """The hub does not answer, or shall not be asked, and the cache has no such file."""
        from huggingface_hub import errors
        if isinstance(why, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE forbids to fetch it"
        else:
            reason = f"{self.url} does not answer ({one_line(why)})"
        if self.folder is None:
            return InputError(f"{self.name}: no such folder, none in the hub's cache, and {reason}")
        return InputError(f"{self.name}: {file} is missing in {self.folder}, a download that was "
                          f"not finished, and {reason}")


def one_line(error: BaseException) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
