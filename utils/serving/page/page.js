// Memory spans and a question → one chat request; its answer as it streams; the same with plain text beside it.

const START = "<|memory_start|>", END = "<|memory_end|>";
const $ = (id) => document.getElementById(id);
const count = (n) => n.toLocaleString("en");
const spans = [];           // {name, text}
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
    fill($("chunk-size"), compression.chunk_sizes, compression.chunk_size);
    fill($("model"), models.data.map((model) => model.id));
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

/** Ask, and show the answer in `article` as it comes; returns the milliseconds before its first token, or null. */
async function ask(article, content, extension, onHeaders = () => {}) {
  const answer = article.querySelector(".answer"), figures = article.querySelector(".figures");
  answer.textContent = figures.textContent = "";
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
  const tokens = Number(of("Memory-Tokens")), latents = Number(of("Latents")), cached = Number(of("Cached-Tokens"));
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

async function submit(event) {
  event.preventDefault();
  if (running || !$("ask").reportValidity()) return;
  if ($("paste").value.trim()) addPasted();
  running = new AbortController();
  const asked = [...spans];
  $("send").disabled = true;
  $("stop").disabled = false;
  $("totals").hidden = $("span-table").hidden = $("compressed").hidden = $("plain-text").hidden = true;
  try {
    say("Compressing and asking …");
    const extension = { code_llava: { chunk_size: Number($("chunk-size").value) } };
    const first = await ask($("compressed"), message(asked, (text) => START + text + END), extension, (got) => showReport(got, asked));
    if (first !== null) show("total-first", seconds(first));
    if ($("plain").checked) {
      // One after the other: side by side each would slow the other down.
      say("Asking with plain text …");
      const plainFirst = await ask($("plain-text"), message(asked, (text) => text), {});
      if (first !== null && plainFirst !== null) show("total-first", seconds(first), `plain text ${seconds(plainFirst)}`);
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
connect();
