// Memory spans and a question → the same chat with latents only, with selected text, and with plain text, side by side.

const START = "<|memory_start|>", END = "<|memory_end|>";
const $ = (id) => document.getElementById(id);
const count = (n) => n.toLocaleString("en");
const spans = [];           // {name, text}
// The slider's places: shares of the memory that stay text.
const SHARES = ["0", "1/32", "1/16", "1/8", "1/4", "1/2", "1"];
let textOnly = false;       // the backend takes no latents
let tokens = 0;             // of the memory in the question in work
let running = null;         // AbortController of the question in work

// --- the server

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  const text = await response.text();
  try { return new Error(`${response.status}: ${JSON.parse(text).error.message}`); }
  catch { return new Error(`${response.status}: ${text}`); }
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, value === chosen, value === chosen)));
}

async function connect() {
  try {
    const [compression, models] = await Promise.all([get("/v1/compression"), get("/v1/models")]);
    textOnly = compression.mode === "text";
    $("chunk-size-field").hidden = textOnly;
    $("kept-others").textContent = textOnly ? "a note of their length" : "latents";
    $("budget").min = textOnly ? 1 : 0;
    showBudget();
    fill($("chunk-size"), compression.chunk_sizes, compression.chunk_size);
    fill($("model"), models.data.filter((model) => !model.code_llava).map((model) => model.id));
    $("server").textContent = `checkpoint ${compression.checkpoint}`;
    $("server").classList.remove("bad");
  } catch (error) {
    $("server").textContent = error.message;
    $("server").classList.add("bad");
  }
}

// --- memory

function addSpan(name, text) {
  if (text.includes("\0")) return say(`${name} is not a text file`, true);
  if (!text.trim()) return say(`${name} is empty`, true);
  spans.push({ name, text });
  showSpans();
}

async function addFiles(files) {
  for (const file of files) {
    try { addSpan(file.name, await file.text()); }
    catch { say(`${file.name} cannot be read`, true); }
  }
}

function showSpans() {
  $("spans").replaceChildren(...spans.map((span, index) => {
    const name = element("span", span.name, "name"), size = element("span", `${count(span.text.length)} characters`, "quiet");
    const remove = element("button", "Remove");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${span.name}`);
    remove.onclick = () => { spans.splice(index, 1); showSpans(); };
    const item = element("li");
    item.append(name, size, remove);
    return item;
  }));
}

// --- asking

/** The user's message. The question comes last, so that what stands before it can be cached by the server. */
function message(asked, wrap) {
  return [...asked.map((span) => `File ${span.name}:\n${wrap(span.text)}\n`), $("question").value].join("\n");
}

/** What a request asks of the gateway. */
function extension(expand) {
  return { code_llava: { ...(!textOnly && { chunk_size: Number($("chunk-size").value) }), ...expand } };
}

/** Ask, and show the answer in `article` as it comes; returns the milliseconds before its first token, or null. */
async function ask(article, content, extension, onHeaders) {
  const answer = article.querySelector(".answer"), figures = article.querySelector(".figures");
  answer.textContent = figures.textContent = article.querySelector(".rows").textContent = "";
  article.hidden = false;
  const began = performance.now();
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), signal: running.signal,
    body: JSON.stringify({
      model: $("model").value, messages: [{ role: "user", content }], ...extension,
      max_tokens: $("max-tokens").valueAsNumber, temperature: $("temperature").valueAsNumber,
      stream: true, stream_options: { include_usage: true },
    }),
  });
  if (!response.ok) throw await failure(response);
  onHeaders(response.headers);
  let first = null, usage = null;
  for await (const piece of events(response.body)) {
    if (piece.error) throw new Error(piece.error.message);
    usage = piece.usage ?? usage;
    const text = piece.choices?.[0]?.delta?.content;
    if (text) {
      first ??= performance.now() - began;
      answer.append(text);
    }
  }
  const parts = [first === null ? "no text" : `first token after ${seconds(first)}`, `${seconds(performance.now() - began)} in all`];
  if (usage) parts.push(`prompt of ${count(usage.prompt_tokens)} rows`, `${count(usage.completion_tokens)} new tokens`);
  figures.textContent = parts.join(" · ");
  return first;
}

/** The JSON values of a stream of server-sent events. */
async function* events(body) {
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: [DONE]")) return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

/** What the gateway said about the memory, in the headers of a streamed answer. */
function showReport(responseHeaders, asked) {
  const of = (name) => responseHeaders.get(`X-Code-Llava-${name}`);
  const shown = of("Latents") !== null;
  $("totals").hidden = $("span-table").hidden = !shown;
  if (!shown) return;
  if (of("Fallback")) say("The encoder failed: the memory was sent as plain text.", true);
  const latents = Number(of("Latents")), cached = Number(of("Cached-Tokens"));
  tokens = Number(of("Memory-Tokens"));
  showRows("compressed", tokens, latents, 0);
  show("total-latents", `${count(tokens)} → ${count(latents)}`, latents ? `ratio ${ratio(tokens, latents)}` : "");
  show("total-saved", count(tokens - latents), tokens ? `${percent(tokens - latents, tokens)} of the memory` : "");
  show("total-cached", tokens ? percent(cached, tokens) : "–", `${count(cached)} tokens`);
  show("total-milliseconds", `${milliseconds(of("Encode-Milliseconds"))} ms`);
  // A report of very many spans does not fit into a header; the totals always do.
  const reports = JSON.parse(of("Spans") ?? "[]");
  const longest = Math.max(...reports.map((report) => report.tokens));
  $("span-table").hidden = reports.length === 0;
  $("span-table").tBodies[0].replaceChildren(...reports.map((report, index) => {
    const row = element("tr"), counts = element("td", `${count(report.tokens)} → ${count(report.latents)}`);
    const bar = element("span", "", "bar"), part = element("i");
    bar.style.width = `${100 * report.tokens / longest}%`;
    part.style.width = `${100 * report.latents / report.tokens}%`;
    bar.append(part);
    counts.append(bar);
    row.append(element("td", asked[index].name), counts, element("td", ratio(report.tokens, report.latents)),
      element("td", percent(report.cached_tokens, report.tokens)), element("td", milliseconds(report.milliseconds)));
    return row;
  }));
}

/** The same for the request that keeps text: which characters of the memory it is. */
function showKept(responseHeaders, asked) {
  const of = (name) => responseHeaders.get(`X-Code-Llava-${name}`);
  if (of("Latents") === null) return;
  const text = Number(of("Text-Rows"));
  tokens = Number(of("Memory-Tokens"));
  showRows("expanded", tokens, Number(of("Latents")), text);
  const ranges = of("Text-Chars") ? JSON.parse(of("Text-Chars")) : asked.map(() => []);
  $("kept").hidden = false;
  if (text && !of("Text-Chars")) return $("kept-spans").replaceChildren(element("p", "Too many places to show.", "quiet"));
  $("kept-spans").replaceChildren(...asked.flatMap((span, index) => {
    const view = element("pre"), kept = ranges[index].length;
    view.tabIndex = 0;
    view.setAttribute("role", "region");
    view.setAttribute("aria-label", `${span.name}: ${kept} places kept as text`);
    view.append(...marked(span.text, ranges[index]));
    return [element("h3", `${span.name} – ${kept ? `${count(kept)} ${kept === 1 ? "place" : "places"}` : "nothing"} kept as text`), view];
  }));
}

/** A text's nodes with ranges of it marked. The ranges count Unicode characters, a JavaScript string UTF-16 units. */
function marked(text, ranges) {
  const nodes = [];
  let unit = 0, character = 0, from = 0;
  const unitOf = (wanted) => {
    for (; character < wanted && unit < text.length; character++) unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
    return unit;
  };
  for (const [begin, end] of ranges) {
    const start = unitOf(begin), stop = unitOf(end);
    nodes.push(text.slice(from, start), element("mark", text.slice(start, stop)));
    from = stop;
  }
  return [...nodes, text.slice(from)];
}

/** How many rows the memory takes in one of the prompts. */
function showRows(id, tokens, latents, text) {
  if (!tokens) return;
  const kinds = [latents && `${count(latents)} latents`, text && `${count(text)} of text`].filter(Boolean).join(" + ");
  $(id).querySelector(".rows").textContent =
    `memory in ${count(latents + text)} rows (${kinds}), ratio ${ratio(tokens, latents + text)}`;
}

function showBudget() {
  const share = SHARES[$("budget").value], shown = { 0: "nothing", 1: "all" }[share] ?? share;
  $("budget-shown").value = shown;
  $("budget").setAttribute("aria-valuetext", shown);
}

/** The requests of one question, in order: article, message, what is asked of the gateway, what shows its report. */
function requests(asked) {
  const share = SHARES[$("budget").value], withMarkers = message(asked, (text) => START + text + END);
  const all = [];
  if (!textOnly) all.push(["compressed", withMarkers, extension({ expand_tokens: 0 }), (got) => showReport(got, asked)]);
  if (textOnly || (share !== "0" && asked.length)) {
    const budget = share === "1" ? { expand_policy: "all" } : { expand: share };
    all.push(["expanded", withMarkers, extension(budget), (got) => showKept(got, asked)]);
  }
  if ($("plain").checked) all.push(["plain-text", message(asked, (text) => text), {}, () => showRows("plain-text", tokens, 0, tokens)]);
  return all;
}

async function submit(event) {
  event.preventDefault();
  if (running || !$("ask").reportValidity()) return;
  if ($("paste").value.trim()) addPasted();
  running = new AbortController();
  const asked = [...spans], firsts = [];
  tokens = 0;
  $("send").disabled = true;
  $("stop").disabled = false;
  for (const id of ["totals", "span-table", "compressed", "expanded", "plain-text", "kept"]) $(id).hidden = true;
  try {
    // One after the other: side by side each would slow the others down.
    for (const [id, content, extension, onHeaders] of requests(asked)) {
      const title = $(id).querySelector("h2").textContent;
      say(`Asking: ${title.toLowerCase()} …`);
      const first = await ask($(id), content, extension, onHeaders);
      if (first !== null) firsts.push([title.toLowerCase(), first]);
      if (firsts.length) show("total-first", seconds(firsts[0][1]), firsts.slice(1).map(([name, ms]) => `${name} ${seconds(ms)}`).join(", "));
    }
    say("Done.");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

// --- small helpers

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}
function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}
function addPasted() {
  addSpan(`pasted text ${spans.filter((span) => span.name.startsWith("pasted")).length + 1}`, $("paste").value);
  $("paste").value = "";
}
/** Put a figure, and a small remark below it, into a tile. */
function show(id, figure, remark = "") {
  $(id).replaceChildren(figure, element("small", remark));
}
const percent = (part, whole) => `${Math.round(100 * part / whole)} %`;
const milliseconds = (value) => Number(value) < 10 ? Number(value).toFixed(1) : count(Math.round(Number(value)));
const ratio = (tokens, latents) => `${(tokens / latents).toFixed(1)}×`;
const seconds = (milliseconds) => milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;

$("add").onclick = addPasted;
$("files").onchange = async () => { await addFiles($("files").files); $("files").value = ""; };
$("key").onchange = connect;
$("budget").oninput = showBudget;
$("stop").onclick = () => running?.abort();
$("ask").onsubmit = submit;
$("question").onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event); };
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") addFiles(event.dataTransfer.files);
  });
}
showBudget();
connect();
