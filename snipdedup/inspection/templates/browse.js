// Shows the rows of a report: groups by pages, pairs near the slider, one row enlarged; keeps what
// the reader marks. Texts are strangers': they go into the page as text only, never as HTML.
(() => {
  const by = (id) => document.getElementById(id);
  const data = JSON.parse(by("data").textContent);
  const count = new Intl.NumberFormat("en-US");
  const lines = new Map(data.rows.map((line) => [line[0], line]));
  const place = Object.fromEntries(data.fields.map((name, at) => [name, at]));
  const rowOf = (number) => {
    const line = lines.get(number);
    const value = (name) => line[place[name]];
    return line && new Proxy({}, { get: (_, name) => value(name) });
  };
  const PAGE = { pictures: 10, table: 50 }; // groups
  const NEAR = 6; // pairs on each side of the slider
  const verdicts = new Map(); // row to [entry, yes or no]
  const decisions = new Map(); // row to keep or drop
  const sets = new WeakMap(); // a shown item to [sets of entries, number of its set, place in it]
  const view = () => by("view").value;

  // ---- pieces of the page

  function make(tag, about = {}, ...inside) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(about)) {
      if (value !== undefined && value !== null) made.setAttribute(name, value);
    }
    made.append(...inside.filter((part) => part !== null && part !== undefined && part !== ""));
    return made;
  }
  const cosine = (value) => {
    if (value === null) return "unknown";
    return value === 1 ? "1" : Math.min(value, 0.9999).toFixed(4);
  };
  const state = (row) => (row.removed ? "removed" : "kept");
  const safe = (link) => (/^https?:\/\//i.test(link || "") && URL.canParse(link) ? link : "");
  const isolated = (text) => make("bdi", {}, text);
  const nameOf = (row) => row.key || `row ${count.format(row.row)}`;

  function tile(number, kind, badge, size = "") {
    const row = rowOf(number);
    if (!row) return make("p", { class: "tile quiet" }, `row ${count.format(~number)} of a reference`);
    const link = safe(row.link);
    const figure = make("figure", { class: `tile ${kind} ${size}`, "data-row": row.row });
    if (row.picture) {
      const picture = make("img", { src: row.picture, alt: `row ${row.row}` });
      figure.append(size ? picture : make("button", { class: "open", type: "button", "aria-label": `Enlarge row ${row.row}` }, picture));
    } else if (row.changed) {
      figure.append(make("p", { class: "changed" }, "changed since it was embedded"));
    } else if (link) {
      const host = make("span", { class: "host" }, "from ", isolated(new URL(link).hostname));
      figure.append(make("button", { class: "fetch", type: "button", "data-src": link, "data-row": row.row },
        make("span", { class: "ask" }, "Fetch picture"), host));
    }
    const url = link
      ? make("a", { href: link, rel: "noopener noreferrer nofollow", referrerpolicy: "no-referrer", target: "_blank" }, make("bdi", { dir: "ltr" }, row.url))
      : make("bdi", { dir: "ltr" }, row.url || "");
    const named = `row ${count.format(row.row)}`;
    const where = row.picture || size ? named : make("button", { class: "open plain", type: "button" }, named);
    figure.append(make("figcaption", {},
      make("p", { class: "badge" }, badge, row.also && row.removed ? make("span", { class: "quiet" }, ` · ${row.also}`) : null),
      make("p", { class: "mark" }),
      row.key ? make("p", { class: "key" }, isolated(row.key)) : null,
      row.caption ? make("p", { class: "caption", dir: "auto" }, row.caption) : null,
      row.long ? make("p", { class: "quiet" }, `${count.format(row.long)} characters`) : null,
      row.facts ? make("p", { class: "place" }, isolated(row.facts)) : null,
      make("p", { class: "place" }, where),
      make("p", { class: "place quiet" }, isolated(data.shards[row.shard]), ` · ${count.format(row.place)}`),
      row.url ? make("p", { class: "url" }, url) : null));
    return figure;
  }

  const badgeOf = ([number, , value]) => {
    const row = rowOf(number);
    return row.removed ? `removed · ${cosine(value)}` : "kept";
  };
  const hasPair = ([number, other]) => rowOf(number).removed && other !== number;

  function pairLabel([number, other, value]) {
    if (!hasPair([number, other])) return `Row ${number} is ${state(rowOf(number))}`;
    const whose = other < 0 ? `${~other} of a reference` : other;
    return `Row ${number} is removed for row ${whose}, cosine ${cosine(value)}`;
  }

  // A removed row beside the row that it is removed for; of two kept rows see `chains`.
  function pair(entry, label, badges) {
    const [number, other, value] = entry;
    const card = make("article", { class: "pair item", "aria-label": label || pairLabel(entry) });
    const alone = other === number;
    if (!badges && !alone) card.append(make("p", { class: "cosine" }, make("span", { class: "quiet" }, "cosine "), cosine(value)));
    const [first, second] = badges || [state(rowOf(number)), other < 0 ? "" : state(rowOf(other))];
    card.append(tile(number, state(rowOf(number)), first));
    if (!alone) card.append(tile(other, badges ? "other" : second, second));
    return card;
  }

  // A table; each line is an item that opens what it stands for.
  function table(heads, found) {
    const used = heads.map((_, at) => at === 0 || found.some(([cells]) => cells[at] !== "")); // else left out
    const text = (at) => (found.some(([cells]) => typeof cells[at] === "string") ? "text" : null);
    const head = make("tr", {}, ...heads.map((name, at) => (used[at] ? make("th", { scope: "col", class: text(at) }, name) : "")));
    const body = found.map(([cells, item]) => {
      const [first, ...rest] = cells.filter((_, at) => used[at]);
      const open = make("button", { class: "open plain", type: "button" }, isolated(first), make("span", { class: "mark" }));
      const line = make("tr", { class: "item" }, make("th", { scope: "row" }, open),
        ...rest.map((cell) => make("td", { class: typeof cell === "string" ? "text" : "", dir: typeof cell === "string" ? "auto" : null },
          typeof cell === "number" ? count.format(cell) : typeof cell === "string" ? cell : cell[0])));
      line.dataset.row = item[0][item[1]].entries[item[2]][0];
      sets.set(line, item);
      return line;
    });
    return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": heads[0] },
      make("table", { class: "compact" }, make("thead", {}, head), make("tbody", {}, ...body)));
  }

  // Entries as cards, or as lines of a table, into an element.
  function showPairs(target, entries, label, badges, title = "Pairs") {
    const set = [{ title, entries }];
    const cards = entries.map((entry, at) => {
      if (view() === "table") {
        const [row, other] = [rowOf(entry[0]), rowOf(entry[1])];
        const about = (one) => (one ? one.caption || one.url || "" : "");
        const second = entry[0] === entry[1] ? "" : other ? nameOf(other) : `row ${~entry[1]} of a reference`;
        return [[nameOf(row), about(row), second, second && about(other), badges ? "" : [cosine(entry[2])]], [set, 0, at]];
      }
      const card = pair(entry, label && label(entry), badges);
      sets.set(card, [set, 0, at]);
      return card;
    });
    const heads = [badges ? "row" : "removed row", "", badges ? "other row" : "kept row", "", "cosine"];
    const shown = view() === "table" ? table(heads, cards) : make("div", { class: "pairs" }, ...cards);
    target.replaceChildren(cards.length ? shown : make("p", { class: "quiet" }, "None."));
    paint();
  }

  // ---- pairs: near the slider, or drawn at random from a band of cosines

  const known = new Map();
  for (const entry of [...data.bands.flat(), ...data.groups.flatMap((group) => group[4])]) {
    if (hasPair(entry)) known.set(entry[0], entry);
  }
  const nearest = [...known.values()].sort((a, b) => (a[2] ?? -1) - (b[2] ?? -1) || a[0] - b[0]);

  function showNear() {
    const band = by("band").value;
    if (band) return showPairs(by("pairs-list"), data.bands[band]);
    const slider = by("slider");
    const threshold = slider ? Number(by("at-threshold").textContent) : -Infinity;
    let first = nearest.findIndex((entry) => Math.fround(entry[2] ?? 0) >= Math.fround(threshold));
    if (first < 0) first = nearest.length;
    by("near").textContent = !slider ? "" : `Those from ${cosine(threshold)} on come first; then those just below, which this threshold would keep apart.`;
    const above = nearest.slice(first, first + NEAR * (first ? 1 : 2));
    return showPairs(by("pairs-list"), [...above, ...nearest.slice(Math.max(0, first - NEAR), first).reverse()]);
  }

  // ---- groups: filtered, ordered, by pages

  let page = 0;
  const orders = {
    size: (a, b) => b[1] - a[1] || a[0] - b[0],
    lowest: (a, b) => (a[3] ?? 2) - (b[3] ?? 2) || a[0] - b[0],
    removed: (a, b) => b[2] - a[2] || a[0] - b[0],
    row: (a, b) => a[0] - b[0],
  };
  const number = (id, other) => (by(id).value.trim() === "" ? other : Number(by(id).value));

  function foundGroups() {
    const words = by("find").value.trim().toLowerCase();
    const [low, high] = [number("low", -Infinity), number("high", Infinity)];
    const shard = by("shard").value;
    const anyCosine = low === -Infinity && high === Infinity;
    const fits = (entry) => {
      const line = lines.get(entry[0]);
      if (shard !== "" && line[place.shard] !== Number(shard)) return false;
      if (!anyCosine && !(line[place.removed] && entry[2] !== null && entry[2] >= low && entry[2] <= high)) return false;
      return !words || [place.key, place.caption].some((at) => (line[at] || "").toLowerCase().includes(words));
    };
    return data.groups.filter((group) => group[4].some(fits)).sort(orders[by("order").value]);
  }

  function showGroups() {
    const found = foundGroups();
    const size = PAGE[view()];
    const last = Math.max(0, Math.ceil(found.length / size) - 1);
    page = Math.min(Math.max(page, 0), last);
    const some = found.slice(page * size, (page + 1) * size);
    const listed = some.map((group) => ({
      title: `Group ${count.format(group[0])}, ${count.format(group[1])} rows`, entries: group[4],
    }));
    const first = page * size + 1;
    by("found").textContent = found.length
      ? `${count.format(first)} to ${count.format(first + some.length - 1)} of ${count.format(found.length)} groups` : "No group fits.";
    by("page").textContent = `page ${count.format(page + 1)} of ${count.format(last + 1)}`;
    by("previous").disabled = page === 0;
    by("next").disabled = page === last;
    if (view() === "table") {
      const cells = some.map((group, at) => {
        const row = rowOf(group[4][0][0]);
        return [[nameOf(row), group[1], group[2], group[1] - group[2], [cosine(group[3])], row.caption || row.url || ""], [listed, at, 0]];
      });
      by("groups-list").replaceChildren(table(["group of", "rows", "removed", "kept", "lowest cosine", ""], cells));
    } else {
      by("groups-list").replaceChildren(...some.map((group, at) => groupCard(group, listed, at)));
    }
    paint();
  }

  function groupCard([label, size, removed, lowest, entries], listed, at) {
    const items = entries.map((entry, inside) => {
      const item = make("li", { class: "item" }, tile(entry[0], state(rowOf(entry[0])), badgeOf(entry)));
      sets.set(item, [listed, at, inside]);
      return item;
    });
    const about = make("span", { class: "quiet" }, `group ${count.format(label)}`, lowest === null ? "" : `, lowest cosine ${cosine(lowest)}`,
      entries.length < size ? `, ${entries.length} rows here` : "");
    return make("article", { class: "group", "aria-label": `Group ${label}` },
      make("p", { class: "about" }, make("b", {}, `${count.format(size)} rows`),
        make("span", {}, make("span", { class: "go" }, `${count.format(removed)} removed`), ", ",
          make("span", { class: "stay" }, `${count.format(size - removed)} kept`)),
        size - removed > 1 ? make("span", { class: "chip" }, "chained") : null, about),
      make("ul", { class: "tiles" }, ...items));
  }

  // ---- one row enlarged, beside the one that it is removed for

  const viewer = by("viewer");
  let open = null; // [sets, number of the set, place in it]

  function look(item) {
    open = item;
    const [all, at, inside] = item;
    const entry = all[at].entries[inside];
    const paired = hasPair(entry) || (entry[0] !== entry[1] && entry[2] === null);
    by("viewer-title").textContent = `${all[at].title}: ${inside + 1} of ${all[at].entries.length}`;
    by("viewed").replaceChildren(
      side(entry[0], badgeOf(entry), "K", "D"),
      ...(paired ? [side(entry[1], entry[1] < 0 ? "" : state(rowOf(entry[1])), "Shift+K", "Shift+D")] : []));
    by("between").hidden = all.length < 2;
    viewer.querySelector("[data-step='-1']").disabled = inside === 0;
    viewer.querySelector("[data-step='1']").disabled = inside === all[at].entries.length - 1;
    for (const button of viewer.querySelectorAll("[data-verdict]")) button.hidden = !canJudge(entry);
    if (!viewer.open) viewer.showModal();
    paint();
  }

  function side(row, badge, keep, drop) {
    if (row < 0) return tile(row);
    const button = (word, key) => make("button", { type: "button", "data-decision": word, "data-of": row, "aria-keyshortcuts": key, "aria-pressed": "false" },
      word === "keep" ? "Keep" : "Drop", make("kbd", {}, key));
    return make("div", { class: "side" }, tile(row, state(rowOf(row)), badge, "large"),
      make("p", { class: "buttons" }, button("keep", keep), button("drop", drop)));
  }

  function step(by_, sets_ = 0) {
    const [all, at, inside] = open;
    const set = Math.min(Math.max(at + sets_, 0), all.length - 1);
    const next = sets_ ? 0 : inside + by_;
    if (set === at && sets_) return;
    if (next >= 0 && next < all[set].entries.length) look([all, set, next]);
  }

  // ---- marks

  const canJudge = (entry) => hasPair(entry) && entry[1] >= 0;
  const toggle = (marks, key, value, same) => (same ? marks.delete(key) : marks.set(key, value));
  let saved = 0; // marks that were made and saved
  let made = 0;

  function judge(entry, verdict) {
    if (!canJudge(entry)) return;
    toggle(verdicts, entry[0], [entry, verdict], verdicts.get(entry[0])?.[1] === verdict);
    made += 1;
    paint();
  }
  function decide(row, word) {
    if (row < 0) return;
    toggle(decisions, row, word, decisions.get(row) === word);
    made += 1;
    paint();
  }

  const WORDS = { yes: "right", no: "wrong" };
  function paint() {
    const texts = (row) => [WORDS[verdicts.get(row)?.[1]], decisions.get(row)].filter(Boolean).join(", ");
    for (const shown of document.querySelectorAll("[data-row] .mark")) {
      shown.textContent = texts(Number(shown.closest("[data-row]").dataset.row));
    }
    if (open) {
      const entry = open[0][open[1]].entries[open[2]];
      for (const button of viewer.querySelectorAll("[data-verdict]")) {
        button.setAttribute("aria-pressed", String(verdicts.get(entry[0])?.[1] === button.dataset.verdict));
      }
      for (const button of viewer.querySelectorAll("[data-decision]")) {
        button.setAttribute("aria-pressed", String(decisions.get(Number(button.dataset.of)) === button.dataset.decision));
      }
    }
    const right = [...verdicts.values()].filter(([, word]) => word === "yes").length;
    const keep = [...decisions.values()].filter((word) => word === "keep").length;
    by("marks").hidden = !verdicts.size && !decisions.size;
    by("judged").hidden = !verdicts.size;
    by("decided").hidden = !decisions.size;
    by("judged-count").textContent = `${count.format(right)} right, ${count.format(verdicts.size - right)} wrong`;
    by("decided-count").textContent = `${count.format(keep)} to keep, ${count.format(decisions.size - keep)} to drop`;
  }

  const keyOf = (row) => (row.cutKey ? "" : row.key || "");
  // As snip audit --sheet: what a spreadsheet would take for a formula gets a quote in front.
  const field = (value) => {
    const text = /^[=+\-@]/.test(String(value)) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  function save(name, lines_) {
    const text = `\ufeff${lines_.map((line) => line.map(field).join(",")).join("\n")}\n`;
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    saved = made;
  }
  by("save-judged").addEventListener("click", () => save("judged.csv", [
    ["row", "representative", "cosine", "verdict", "key", "representative_key"],
    ...[...verdicts.values()].map(([[row, other, value], word]) => [row, other, value ?? "", word, keyOf(rowOf(row)), keyOf(rowOf(other))]),
  ]));
  by("save-decided").addEventListener("click", () => save("decisions.csv", [
    ["row", "key", "decision"], ...[...decisions].map(([row, word]) => [row, keyOf(rowOf(row)), word]),
  ]));
  addEventListener("beforeunload", (event) => { if (made !== saved) event.preventDefault(); });

  // ---- what the reader does

  document.addEventListener("click", (event) => {
    const item = event.target.closest(".open")?.closest(".item");
    if (item) look(clicked(item, event.target));
    const button = event.target.closest("#viewer button");
    if (button?.dataset.step) step(Number(button.dataset.step));
    if (button?.dataset.verdict) judge(open[0][open[1]].entries[open[2]], button.dataset.verdict);
    if (button?.dataset.decision) decide(Number(button.dataset.of), button.dataset.decision);
    if (button?.id === "close" || event.target === viewer) viewer.close();
  });
  const clicked = (item) => sets.get(item);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
    const item = viewer.open ? open : sets.get(event.target.closest(".item"));
    if (!item) return;
    const entry = item[0][item[1]].entries[item[2]];
    const key = event.key.toLowerCase();
    const row = event.shiftKey && hasPair(entry) ? entry[1] : entry[0];
    const steps = { arrowleft: [-1], arrowright: [1], arrowup: [0, -1], arrowdown: [0, 1] };
    if (key === "r") judge(entry, "yes");
    else if (key === "w") judge(entry, "no");
    else if (key === "k") decide(row, "keep");
    else if (key === "d") decide(row, "drop");
    else if (viewer.open && steps[key]) step(...steps[key]);
    else return;
    event.preventDefault();
  });
  viewer.addEventListener("close", () => { open = null; });

  function showAll() {
    showNear();
    showGroups();
    if (by("asked-list")) showPairs(by("asked-list"), data.asked);
    const copied = [{ title: "Most copied", entries: data.copied.map(([row]) => [row, row, null]) }];
    const items = data.copied.map(([row, times], at) => {
      const item = make("li", { class: "item" }, tile(row, state(rowOf(row)), `× ${count.format(times)}`));
      sets.set(item, [copied, 0, at]);
      return item;
    });
    const listed = data.copied.map(([row, times], at) => [[nameOf(rowOf(row)), times, rowOf(row).caption || rowOf(row).url || ""], [copied, 0, at]]);
    by("copied-list").replaceChildren(!items.length ? make("p", { class: "quiet" }, "None.")
      : view() === "table" ? table(["row", "dup_count", ""], listed) : make("ol", { class: "tiles" }, ...items));
    if (by("spared-list")) {
      const label = ([row, other]) => `Row ${row} is kept; components would keep row ${other} only`;
      showPairs(by("spared-list"), data.spared, label, ["kept", data.knownKeep ? "kept by components" : "kept in this group"]);
    }
    if (by("below-list")) showPairs(by("below-list"), data.below);
    paint();
  }

  for (const [at, name] of data.shards.entries()) by("shard").append(make("option", { value: at }, name));
  for (const id of ["find", "low", "high", "shard", "order"]) {
    by(id).addEventListener("input", () => { page = 0; showGroups(); });
  }
  by("previous").addEventListener("click", () => { page -= 1; showGroups(); });
  by("next").addEventListener("click", () => { page += 1; showGroups(); });
  by("view").addEventListener("input", () => { page = 0; showAll(); });
  by("band").addEventListener("input", showNear);
  document.addEventListener("threshold", showNear);
  showAll();
})();
