// Colours in code: comments, strings, numbers and the words of the usual languages. One pass, no grammar.

const HASH = new Set("python py bash sh shell zsh console yaml yml toml ruby rb perl r makefile dockerfile nix elixir".split(" "));
const DASHES = new Set("sql lua haskell hs ada".split(" "));
const NO_WORDS = new Set(["", "text", "txt", "plain", "markdown", "md", "output", "log", "csv"]);
const WORDS = new Set(
  (
    "abstract and as assert async await begin bool boolean break by case catch char class const continue crate create def default " +
    "defer del delete do done double elif else elsif end enum esac except export extends extern false False fi final finally " +
    "float fn for foreach from func function global go goto group if impl implements import in include insert instanceof int " +
    "interface into is join lambda let limit local long loop match mod module mut namespace new nil None nonlocal not null " +
    "nullptr of on or order override package pass private protected pub public raise range readonly ref return select self " +
    "Self set short signed sizeof static string struct super switch table template then this throw trait true True try type " +
    "typedef typename undefined union unsafe unsigned until update use using values var virtual void where while with yield"
  ).split(" "),
);
const MOST = 20000; // longer code stays plain: an unclosed comment is looked for from each of its beginnings

/** Puts code into a node, in spans of the classes comment, string, number and word. */
function highlight(text, language, into) {
  const name = language.toLowerCase();
  if (NO_WORDS.has(name) || text.length > MOST) {
    into.append(text);
    return;
  }
  const comment = HASH.has(name) ? "#[^\\n]*" : DASHES.has(name) ? "--[^\\n]*" : "//[^\\n]*|/\\*[^]*?\\*/|<!--[^]*?-->";
  const string = '"""[^]*?"""|"(?:\\\\.|[^"\\\\\\n])*"|\'(?:\\\\.|[^\'\\\\\\n])*\'|`(?:\\\\.|[^`\\\\])*`';
  const pieces = new RegExp(`(${comment})|(${string})|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)`, "g");
  let done = 0;
  for (const found of text.matchAll(pieces)) {
    const [whole, a, b, c, word] = found;
    const kind = a ? "comment" : b ? "string" : c ? "number" : WORDS.has(word) || (name === "sql" && WORDS.has(word.toLowerCase())) ? "word" : "";
    if (!kind) continue;
    into.append(text.slice(done, found.index), make("span", { class: kind }, whole));
    done = found.index + whole.length;
  }
  into.append(text.slice(done));
}
