// The script of the operator's page: times in the viewer's zone, live figures, copying, sending.
// Without it everything else works.
"use strict";

const REFRESH_MILLISECONDS = 15000;

// --- Times and addresses -------------------------------------------------------------------------

const two = (number) => String(number).padStart(2, "0");

function local(iso, { seconds = true, date = true } = {}) {
  const when = new Date(iso);
  const day = `${when.getFullYear()}-${two(when.getMonth() + 1)}-${two(when.getDate())}`;
  const time = `${two(when.getHours())}:${two(when.getMinutes())}`;
  return (date ? `${day} ` : "") + time + (seconds ? `:${two(when.getSeconds())}` : "");
}

function showTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    time.textContent = local(time.dateTime, { seconds: time.dataset.brief === undefined });
  }
  for (const title of root.querySelectorAll("title[data-from]")) {
    const [from, to] = [title.dataset.from, title.dataset.to].map((iso) =>
      local(iso, { seconds: false, date: false })
    );
    title.textContent = `${from}–${to}${title.textContent.slice(title.textContent.indexOf(":", 12))}`;
  }
}

function showAddresses(root) {
  const base = new URL(document.documentElement.dataset.root, location.href).href;
  for (const place of root.querySelectorAll("[data-base]")) {
    place.textContent = base.replace(/\/$/, "");
  }
}

// --- Copying -------------------------------------------------------------------------------------

function offerCopies() {
  if (!navigator.clipboard) {
    return; // The browser offers it on secure pages only.
  }
  for (const block of document.querySelectorAll(".code")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    block.append(button);
  }
}

// --- Live figures --------------------------------------------------------------------------------
// Text and attributes change in place. What would add or remove elements, and so move others, waits
// until the viewer asks for it.

// A button that acts on another payload, or a link to it, counts as another element.
function hasSameShape(old, fresh) {
  return (
    old.nodeName === fresh.nodeName &&
    ["action", "href"].every((name) => old.getAttribute?.(name) === fresh.getAttribute?.(name)) &&
    old.childNodes.length === fresh.childNodes.length &&
    [...old.childNodes].every((node, index) => hasSameShape(node, fresh.childNodes[index]))
  );
}

function adopt(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) {
      old.data = fresh.data;
    }
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    return;
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (old.getAttribute(name) !== value) {
      old.setAttribute(name, value);
    }
  }
  old.childNodes.forEach((node, index) => adopt(node, fresh.childNodes[index]));
}

function keepLive(bar) {
  const [at, news, show, toggle] = ["at", "news", "show", "toggle"].map((name) =>
    bar.querySelector(`[data-live-${name}]`)
  );
  let timer = 0;
  let waiting = null;
  let isRefreshing = false;

  const say = (words) => (at.textContent = words);
  const now = () => local(new Date().toISOString(), { date: false });

  function apply(page) {
    for (const fresh of page.querySelectorAll("[data-live]")) {
      const old = document.getElementById(fresh.id);
      if (!old) {
        continue;
      }
      if (fresh.dataset.live === "replace") {
        // Its size is fixed, so nothing moves.
        if (!old.matches(":hover")) {
          old.replaceChildren(...fresh.childNodes);
        }
      } else if (hasSameShape(old, fresh)) {
        adopt(old, fresh);
      } else {
        return false;
      }
    }
    return true;
  }

  async function refresh() {
    if (document.hidden || isRefreshing) {
      return;
    }
    isRefreshing = true;
    try {
      const answer = await fetch(location.href, {
        headers: { Accept: "text/html" },
        signal: AbortSignal.timeout(REFRESH_MILLISECONDS),
      });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (!answer.ok || !page.querySelector("[data-live]")) {
        say(`The service answered ${answer.status} at ${now()}.`);
        return;
      }
      showTimes(page);
      const ids = (one) => [...one.querySelectorAll("[data-live]")].map(({ id }) => id).join();
      const isSame = ids(page) === ids(document);
      document.title = page.title;
      if (isSame && apply(page)) {
        waiting = null;
        say(`Updated at ${now()}`);
      } else {
        waiting = page;
        say(`Checked at ${now()}`);
      }
      if (show.hidden !== !waiting) {
        // A screen reader reads it once.
        news.textContent = waiting ? "Newer figures are available." : "";
        show.hidden = !waiting;
      }
    } catch {
      say(`No answer at ${now()}. The service, or the network, is down.`);
    } finally {
      isRefreshing = false;
    }
  }

  function pause(isPaused) {
    clearInterval(timer);
    timer = isPaused ? 0 : setInterval(refresh, REFRESH_MILLISECONDS);
    toggle.textContent = isPaused ? "Resume" : "Pause";
    say(isPaused ? "Paused" : `Live since ${now()}`);
    try {
      sessionStorage.setItem("paused", isPaused ? "1" : "");
    } catch {
      // Storage may be turned off.
    }
  }

  show.addEventListener("click", () => location.reload());
  toggle.addEventListener("click", () => pause(timer !== 0));
  bar.hidden = false;
  let wasPaused = false;
  try {
    wasPaused = sessionStorage.getItem("paused") === "1";
  } catch {
    // As above.
  }
  pause(wasPaused);
}

// --- Sending -------------------------------------------------------------------------------------
// The page is a STOW-RS sender: one POST for all files, or one for each.

const TYPE = "application/dicom";
const SNIFFED_AT_ONCE = 16;
const MAX_TRIES = 5;
const MAX_PAUSE_SECONDS = 60;

async function isDicom(file) {
  try {
    const mark = new Uint8Array(await file.slice(128, 132).arrayBuffer());
    return String.fromCharCode(...mark) === "DICM";
  } catch {
    return false; // A file that cannot be read.
  }
}

async function filesOf(entry, path = "") {
  if (entry.isFile) {
    const file = await new Promise((found, failed) => entry.file(found, failed));
    return [{ file, path: path + file.name }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const entries = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!entries.length) {
      return found;
    }
    for (const inner of entries) {
      found.push(...(await filesOf(inner, `${path}${entry.name}/`)));
    }
  }
}

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; bytes >= 999.5 && unit < units.length - 1; unit += 1) {
    bytes /= 1000;
  }
  return `${unit && bytes < 100 ? Number(bytes.toPrecision(3)) : Math.round(bytes)} ${units[unit]}`;
}

const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

function random() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16)).join("");
}

function multipart(files) {
  const boundary = `stowgate-${random()}`;
  const pieces = files.flatMap(({ file }) => [
    `--${boundary}\r\nContent-Type: ${TYPE}\r\n\r\n`,
    file,
    "\r\n",
  ]);
  const type = `multipart/related; type="${TYPE}"; boundary="${boundary}"`;
  return { body: new Blob([...pieces, `--${boundary}--\r\n`]), type };
}

// The reasons of failed parts by number, as the answer has them in a private element.
function reasonsIn(text) {
  const reasons = new Map();
  const dataset = JSON.parse(text);
  for (const tag of ["00081198", "0008119A"]) {
    for (const item of dataset[tag]?.Value ?? []) {
      const words = item["00091001"]?.Value?.[0] ?? "refused, without a reason";
      const found = /^part (\d+):? ?(.*)$/s.exec(words);
      reasons.set(found ? Number(found[1]) : -reasons.size, found ? found[2] : words);
    }
  }
  return reasons;
}

// The seconds after which the service wants the request again; 0 for a final answer. While the
// first request with a key is running, another with that key is answered 409.
function pauseOf(request) {
  const seconds = Number(request.getResponseHeader("Retry-After"));
  return [409, 429, 503].includes(request.status) && seconds > 0
    ? Math.min(seconds, MAX_PAUSE_SECONDS)
    : 0;
}

function problemIn(request) {
  try {
    return JSON.parse(request.responseText).detail;
  } catch {
    return `the service answered ${request.status}`;
  }
}

function offerSending(form) {
  const find = (name) => form.querySelector(`[data-${name}]`);
  const [drop, list, status, result, send, stop, clear, progress] = [
    ...["drop", "list", "status", "result", "send", "stop", "clear", "progress"],
  ].map(find);
  const body = list.querySelector("tbody");
  const bar = progress.querySelector("progress");
  let items = [];
  let current = null;
  let isStopped = false;
  let isSending = false;
  let said = 0;

  const say = (words) => (status.textContent = words);
  function sayAtTimes(words) {
    if (Date.now() - said > 3000) {
      said = Date.now();
      say(words);
    }
  }

  function fate(item, words, kind = "", url = "") {
    if (item.words === words) {
      return;
    }
    item.words = words;
    item.kind = kind;
    const place = item.row.lastElementChild;
    place.className = `fate ${kind}`;
    place.textContent = words;
    if (url) {
      const link = document.createElement("a");
      link.href = url;
      link.textContent = "payload";
      place.append(", ", link);
    }
  }

  function add(found) {
    for (const { file, path, isDicom } of found) {
      const row = document.createElement("tr");
      const name = document.createElement("th");
      name.scope = "row";
      name.textContent = path;
      const bytes = document.createElement("td");
      bytes.className = "n";
      bytes.textContent = size(file.size);
      row.append(name, bytes, document.createElement("td"));
      // A narrow window shows rows as blocks, which would lose their roles.
      row.setAttribute("role", "row");
      name.setAttribute("role", "rowheader");
      bytes.setAttribute("role", "cell");
      row.lastElementChild.setAttribute("role", "cell");
      body.append(row);
      const item = { file, row, isDicom };
      fate(item, isDicom ? "not sent yet" : "left out: not a DICOM file");
      items.push(item);
    }
    list.hidden = items.length === 0;
    list.classList.toggle("long", items.length > 15);
    if (isSending) {
      return; // What is on its way must not be sent a second time.
    }
    const ready = unsent();
    clear.hidden = list.hidden;
    send.disabled = ready.length === 0;
    const bytes = ready.reduce((sum, { file }) => sum + file.size, 0);
    const left = items.filter((item) => !item.isDicom).length;
    say(
      `${counted(ready.length, "file")} to send, ${size(bytes)}` +
        (left ? `. ${counted(left, "other file")} left out.` : ".")
    );
  }

  const unsent = () => items.filter((item) => item.isDicom && item.kind !== "good");

  async function choose(found) {
    result.hidden = true;
    found.sort((one, other) => (one.path < other.path ? -1 : 1));
    const checked = [];
    for (let start = 0; start < found.length; start += SNIFFED_AT_ONCE) {
      const batch = found.slice(start, start + SNIFFED_AT_ONCE);
      const marks = await Promise.all(batch.map(({ file }) => isDicom(file)));
      checked.push(...batch.map((one, index) => ({ ...one, isDicom: marks[index] })));
      sayAtTimes(`Looking at ${counted(found.length, "file")}: ${checked.length} done.`);
    }
    add(checked);
  }

  function url() {
    const [aet, bound] = form.destination.value.split("/");
    const workflow = form.workflow.value.trim() || bound;
    return [form.dataset.store, aet && `vae/${aet}`, workflow && encodeURIComponent(workflow), "studies"]
      .filter(Boolean)
      .join("/");
  }

  // A retry of the same files has the same key, so that nothing is opened twice.
  function keyOf(batch) {
    const key = batch[0].key;
    const sent = items.filter((item) => item.key === key);
    return key && sent.length === batch.length && batch.every((item) => item.key === key)
      ? key
      : random();
  }

  // Sends some files in one POST, and again if the service was busy.
  async function postPatiently(batch, content, onProgress) {
    for (let tries = 1; ; tries += 1) {
      const pauseSeconds = await post(batch, content, onProgress);
      if (!pauseSeconds || tries === MAX_TRIES) {
        return;
      }
      batch.forEach((item) => fate(item, `the service is busy; sent again in ${pauseSeconds} s`));
      const end = Date.now() + 1000 * pauseSeconds;
      while (!isStopped && Date.now() < end) {
        await new Promise((done) => setTimeout(done, 200));
      }
      if (isStopped) {
        batch.forEach((item) => fate(item, "stopped: not stored", "bad"));
        return;
      }
    }
  }

  // Sends some files in one POST, and shows what became of each. Returns the seconds after which it
  // may be sent again, else 0.
  function post(batch, { body, type }, onProgress) {
    return new Promise((done) => {
      const request = new XMLHttpRequest();
      current = request;
      request.open("POST", url());
      request.setRequestHeader("Content-Type", type);
      request.setRequestHeader("Accept", "application/dicom+json");
      const key = keyOf(batch);
      batch.forEach((item) => (item.key = key));
      request.setRequestHeader("Idempotency-Key", key);
      request.upload.addEventListener("progress", ({ loaded }) => onProgress(loaded));
      const failed = (words) => {
        batch.forEach((item) => fate(item, words, "bad"));
        done(pauseOf(request));
      };
      request.addEventListener("abort", () => failed("stopped: probably not stored"));
      request.addEventListener("error", () =>
        failed("no answer: the connection was lost, or a file cannot be read. Send again")
      );
      request.addEventListener("load", () => {
        const isDataset = (request.getResponseHeader("Content-Type") ?? "").includes("dicom+json");
        if (!isDataset) {
          failed(`not stored: ${problemIn(request)}`);
          return;
        }
        const id = request.getResponseHeader("X-Payload-ID");
        const reasons = reasonsIn(request.responseText);
        batch.forEach((item, index) => {
          item.key = undefined;
          const why = reasons.get(index + 1);
          if (why === undefined) {
            fate(item, "stored", "good", id && form.dataset.payload + id);
          } else {
            fate(item, `not stored: ${why}`, "bad");
          }
        });
        done(0);
      });
      request.send(body);
    });
  }

  async function sendAll() {
    const batch = unsent();
    const total = batch.reduce((sum, { file }) => sum + file.size, 0) || 1;
    isStopped = false;
    isSending = true;
    result.hidden = true;
    progress.hidden = stop.hidden = false;
    send.disabled = clear.hidden = true;
    bar.value = 0;
    const show = (before, group) => (loaded) => {
      let end = 0;
      for (const item of group) {
        const start = end;
        end += item.file.size;
        if (loaded >= end) {
          fate(item, "sent, waiting for the answer");
        } else if (loaded > start) {
          fate(item, `sending, ${Math.floor((100 * (loaded - start)) / item.file.size)} %`);
        }
      }
      bar.value = Math.min(1, (before + loaded) / total);
      sayAtTimes(`Sent ${size(Math.min(total, before + loaded))} of ${size(total)}.`);
    };
    batch.forEach((item) => fate(item, "waiting"));
    if (form.dataset.signIn) {
      // Browsers send a password only below paths that have asked for it: they would send all files
      // without it first.
      await fetch(form.dataset.signIn).catch(() => {});
    }
    if (form.requests.value === "one") {
      await postPatiently(batch, multipart(batch), show(0, batch));
    } else {
      let before = 0;
      for (const item of batch) {
        if (isStopped) {
          fate(item, "not sent yet");
          continue;
        }
        await postPatiently([item], { body: item.file, type: TYPE }, show(before, [item]));
        before += item.file.size;
        bar.value = before / total;
      }
    }
    current = null;
    isSending = false;
    progress.hidden = stop.hidden = true;
    clear.hidden = false;
    send.disabled = unsent().length === 0;
    send.textContent = unsent().length ? "Send again what was not stored" : "Send";
    const stored = batch.filter((item) => item.kind === "good").length;
    const lost = batch.length - stored;
    say("");
    result.hidden = false;
    result.className = `message ${lost ? "bad" : "good"}`;
    result.setAttribute("role", "status");
    result.textContent = lost
      ? `${counted(stored, "file")} of ${batch.length.toLocaleString("en")} stored. The list says why the others were not.`
      : `All ${counted(stored, "file")} stored.`;
  }

  form.hidden = false;
  document.querySelector("[data-without-script]").hidden = true;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sendAll();
  });
  stop.addEventListener("click", () => {
    isStopped = true;
    current?.abort();
  });
  clear.addEventListener("click", () => {
    items = [];
    body.replaceChildren();
    result.hidden = true;
    send.textContent = "Send";
    add([]);
    say("");
  });
  for (const input of [find("files"), find("folder")]) {
    input.addEventListener("change", async () => {
      const found = [...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
      input.value = "";
      await choose(found);
    });
  }
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    // The entries are gone when the event has ended.
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    const files = [...event.dataTransfer.files];
    const found = entries.length ? [] : files.map((file) => ({ file, path: file.name }));
    let unread = "";
    for (const entry of entries) {
      try {
        found.push(...(await filesOf(entry)));
      } catch {
        unread = `${entry.name} cannot be read.`;
      }
    }
    await choose(found);
    if (unread) {
      result.hidden = false;
      result.className = "message bad";
      result.textContent = unread;
    }
  });
}

showTimes(document);
showAddresses(document);
offerCopies();
const bar = document.querySelector("[data-live-bar]");
if (bar) {
  keepLive(bar);
}
const form = document.getElementById("send");
if (form) {
  offerSending(form);
}
