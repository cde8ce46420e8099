// The list of questions: blocks are unpacked when they are needed, and nothing of them is ever put in as HTML.
"use strict";
(async () => {
  const PAGE = 50;
  const $ = (id) => document.getElementById(id);

  const theme = $("theme");
  const stored = (() => { try { return localStorage.getItem("thinkswitch-theme") || ""; } catch { return ""; } })();
  const setTheme = (value) => {
    if (value) document.documentElement.dataset.theme = value;
    else delete document.documentElement.dataset.theme;
  };
  theme.value = stored;
  setTheme(theme.value);
  theme.closest("p").hidden = false;
  theme.addEventListener("change", () => {
    setTheme(theme.value);
    try { localStorage.setItem("thinkswitch-theme", theme.value); } catch { /* a browser that keeps nothing for files */ }
  });

  const count = $("count"), list = $("list");
  if (typeof DecompressionStream === "undefined") {
    count.textContent = "This browser cannot unpack the questions; one of 2023 or later can.";
    return;
  }
  async function unpack(element) {
    const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }
  const blocks = [...document.querySelectorAll("script.block")];
  const opened = new Map();  // the last few blocks, unpacked
  async function block(number) {
    if (!opened.has(number)) {
      if (opened.size >= 4) opened.delete(opened.keys().next().value);
      opened.set(number, unpack(blocks[number]));
    }
    return opened.get(number);
  }
  const index = await unpack($("index"));
  const checkpoints = index.checkpoints;
  const modes = [...new Set(checkpoints.map((c) => c.mode))];
  const starts = index.start.map((text, n) => `#${index.id[n]} ${text} ${index.gold[n]}`.toLowerCase());

  // ---- filters
  const form = $("filters"), search = $("search"), checkpoint = $("checkpoint"), against = $("against"), show = $("show");
  const name = (c) => `${c.mode}, iteration ${c.iteration}`;
  // The starting checkpoint of a hybrid is one, and is there by its modes alone.
  const follows = (c, mode) => c.mode === mode || (c.iteration === 0 && mode.endsWith(`-as-${c.mode}`));
  checkpoints.forEach((c, n) => checkpoint.add(new Option(name(c), n)));
  const last = checkpoints.findLastIndex((c) => c.mode === modes[0]);
  checkpoint.options[last].defaultSelected = true;
  const counterparts = () => {
    const chosen = checkpoints[checkpoint.value], before = against.value;
    against.replaceChildren();
    checkpoints.forEach((c, n) => {
      if (follows(c, chosen.mode) && c.iteration < chosen.iteration) against.add(new Option(`iteration ${c.iteration}`, n));
    });
    against.disabled = !against.options.length;
    if (against.disabled) against.add(new Option("none before it", ""));
    if ([...against.options].some((o) => o.value === before)) against.value = before;
  };
  const tests = {
    all: () => true,
    won: (n, c, b) => b && b.verdict[n] === "0" && c.verdict[n] === "1",
    lost: (n, c, b) => b && b.verdict[n] === "1" && c.verdict[n] === "0",
    right: (n, c) => c.verdict[n] === "1",
    wrong: (n, c) => c.verdict[n] === "0",
    truncated: (n, c) => c.truncated[n] === "1",
    unread: (n, c) => c.unread[n] === "1",
  };
  const haystack = (question) => [
    question.prompt, question.gold,
    ...question.checkpoints.flatMap((c) => c ? [...c.found, ...c.texts.flatMap((t) => [t.trace, t.answer])] : []),
  ].filter(Boolean).join("\n").toLowerCase();

  let run = 0, found = [], page = 0;
  async function apply() {
    const mine = ++run;
    list.ariaBusy = "true";
    const chosen = checkpoints[checkpoint.value], before = checkpoints[against.value];
    const kept = index.id.map((_, n) => n).filter((n) => tests[show.value](n, chosen, before));
    const wanted = search.value.trim().toLowerCase();
    page = 0;
    if (!wanted) return finish(kept);
    if (/^#\d+$/.test(wanted)) return finish(kept.filter((n) => `#${index.id[n]}` === wanted));
    const hits = new Set(kept.filter((n) => starts[n].includes(wanted)));
    const waiting = group(kept);
    let looked = 0;
    for (const [number, members] of waiting) {
      const questions = await block(number);
      if (mine !== run) return;
      for (const n of members) if (!hits.has(n) && haystack(questions[n % index.block]).includes(wanted)) hits.add(n);
      if (++looked % 10 === 0) count.textContent = `Searching, ${Math.round((100 * looked) / waiting.size)} %…`;
    }
    finish(kept.filter((n) => hits.has(n)));
  }
  function group(kept) {
    const groups = new Map();
    for (const n of kept) {
      const number = Math.floor(n / index.block);
      if (!groups.has(number)) groups.set(number, []);
      groups.get(number).push(n);
    }
    return groups;
  }
  function finish(questions) {
    found = questions;
    draw();
    const what = show.value === "all" ? "" : ` ${show.selectedOptions[0].text} by ${name(checkpoints[checkpoint.value])}`;
    const versus = ["won", "lost"].includes(show.value) && !against.disabled ? ` against ${against.selectedOptions[0].text}` : "";
    count.textContent = `${found.length.toLocaleString("en")} of ${index.id.length.toLocaleString("en")} questions${what}${versus}${search.value.trim() ? `, with “${search.value.trim()}”` : ""}`;
    list.ariaBusy = "false";
  }

  // ---- the list
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const WORDS = { 1: "right", 0: "wrong", "-": "not asked" };
  function marks(n) {
    return modes.map((mode) => {
      const own = checkpoints.filter((c) => c.mode === mode);
      const words = own.map((c) => `iteration ${c.iteration} ${WORDS[c.verdict[n]]}${c.truncated[n] === "1" ? ", truncated" : ""}`);
      const line = make("span", { role: "img", "aria-label": `${mode}: ${words.join(", ")}` }, make("span", { class: "of" }, `${mode} `));
      own.forEach((c) => {
        const text = c.right ? (c.right[n] === null ? "–" : `${c.right[n]}/${index.k}`) : { 1: "✓", 0: "✗", "-": "–" }[c.verdict[n]];
        line.append(make("span", { class: `mark ${{ 1: "right", 0: "wrong", "-": "" }[c.verdict[n]]}` }, text));
        if (c.truncated[n] === "1") line.append(make("span", { class: "cut" }, "✂"));
        line.append(" ");
      });
      return line;
    });
  }
  function row(n) {
    const details = make("details", {}, make("summary", {},
      make("span", { class: "id" }, `#${index.id[n]}`),
      make("span", { class: "start" }, make("bdi", {}, index.start[n]), " ", make("span", { class: "gold" }, "= ", make("bdi", {}, index.gold[n]))),
      make("span", { class: "marks" }, ...marks(n))));
    details.addEventListener("toggle", async () => {
      if (!details.open || details.dataset.filled) return;
      details.dataset.filled = "yes";
      details.append(body((await block(Math.floor(n / index.block)))[n % index.block]));
    });
    return make("li", { "data-id": index.id[n] }, details);
  }
  function body(question) {
    const place = make("div", { class: "body" }, make("h3", {}, "Question"), make("pre", { class: "prompt", dir: "auto" }, question.prompt),
      make("p", {}, "Right answer: ", make("strong", { class: "target", dir: "auto" }, question.gold)));
    for (const mode of modes) {
      const cards = checkpoints.map((c, i) => c.mode === mode && question.checkpoints[i] ? card(c, question.checkpoints[i]) : null);
      place.append(make("h3", {}, mode[0].toUpperCase() + mode.slice(1)), make("div", { class: "answers" }, ...cards));
    }
    return place;
  }
  const outcome = (given, j) => make("span", { class: given.correct[j] ? "right" : "wrong" }, given.correct[j] ? "right" : "wrong");
  function card(checkpoint, given) {
    const place = make("div", { class: "answer" }, make("h4", {}, `Iteration ${checkpoint.iteration}`));
    if (given.correct.length > 1) {
      const samples = given.correct.map((right, j) => make("li", {}, make("span", { class: right ? "right" : "wrong" }, right ? "✓" : "✗",
        make("span", { class: "hidden" }, right ? " right" : " wrong")), " ", make("bdi", {}, given.found[j] ?? "no answer"), `, ${given.tokens[j]}`, given.truncated[j] ? make("span", { class: "cut" }, " cut") : ""));
      place.append(make("p", {}, `${given.correct.filter(Boolean).length} of ${given.correct.length} samples right (answer, tokens):`), make("ol", { class: "samples" }, ...samples));
    }
    given.texts.forEach((text, j) => {
      place.append(make("p", {}, given.correct.length > 1 ? `Sample ${j + 1}: ` : "", outcome(given, j), ", read as ", make("bdi", {}, given.found[j] ?? "nothing"), `, ${given.tokens[j]} tokens`,
        given.truncated[j] ? make("span", { class: "cut" }, ", cut by the limit") : ""));
      if (text.trace !== null) {
        place.append(make("details", { class: "trace" }, make("summary", {}, `Trace, ${text.trace.length.toLocaleString("en")} characters`), make("pre", { dir: "auto" }, text.trace || "(empty)")));
      }
      place.append(text.answer === null ? make("p", { class: "cut" }, text.trace === null ? "No answer." : "No answer after the trace.") : make("pre", { class: "given", dir: "auto" }, text.answer));
    });
    place.append(make("details", { class: "place" }, make("summary", {}, "File"), make("p", { class: "source" }, `${checkpoint.file}, line ${given.line}`)));
    return place;
  }
  function draw() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    list.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(row));
    list.start = page * PAGE + 1;
    $("pages").hidden = pages === 1;
    $("page").textContent = `Page ${page + 1} of ${pages}`;
    $("previous").disabled = page === 0;
    $("next").disabled = page + 1 === pages;
  }
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    $(id).addEventListener("click", () => {
      page += step;
      draw();
      $("questions").focus({ preventScroll: true });
      count.scrollIntoView({ block: "start" });
    });
  }

  let timer = 0;
  const later = (what, milliseconds) => { list.ariaBusy = "true"; clearTimeout(timer); timer = setTimeout(what, milliseconds); };
  search.addEventListener("input", () => later(apply, 150));
  checkpoint.addEventListener("change", () => { counterparts(); apply(); });
  against.addEventListener("change", apply);
  show.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => later(() => { counterparts(); apply(); }, 0));
  for (const link of document.querySelectorAll("a[data-show]")) {
    link.addEventListener("click", () => {
      const at = (iteration) => checkpoints.findIndex((c) => follows(c, link.dataset.mode) && c.iteration === Number(iteration));
      checkpoint.value = at(link.dataset.iteration);
      counterparts();
      against.value = at(link.dataset.against);
      show.value = link.dataset.show;
      search.value = "";
      apply();
    });
  }
  form.hidden = false;
  counterparts();
  apply();
})();
