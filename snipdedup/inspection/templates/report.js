"use strict";
document.documentElement.classList.add("js");

(() => {
  const levels = document.getElementById("levels");
  if (!levels) return;
  const data = JSON.parse(levels.textContent);
  const by = (id) => document.getElementById(id);
  const slider = by("slider");
  const count = new Intl.NumberFormat("en-US");
  const last = data.thresholds.length - 1;
  const from = Number(data.thresholds[0]);
  const span = Number(data.thresholds[last]) - from || 1;

  function show() {
    const at = Number(slider.value);
    const threshold = data.thresholds[at];
    const removed = data.removed[at];
    const about = data.estimated[at] ? "~" : "";
    const place = `${(100 * (Number(threshold) - from)) / span}%`;
    by("at-threshold").textContent = threshold;
    by("at-command").textContent = threshold;
    by("at-removed").textContent = about + count.format(removed);
    by("at-share").textContent = `${((100 * removed) / data.rows).toFixed(2)} %`;
    by("at-kept").textContent = about + count.format(data.rows - removed);
    by("at-groups").textContent = count.format(data.groups[at]);
    by("cursor").setAttribute("x1", place);
    by("cursor").setAttribute("x2", place);
    by("dot").setAttribute("cx", place);
    by("dot").setAttribute("cy", data.y[at]);
    slider.setAttribute("aria-valuetext", `${threshold}: ${about}${count.format(removed)} rows removed`);
    document.dispatchEvent(new Event("threshold"));
  }
  slider.addEventListener("input", show);
  show();
})();

// A picture that lies elsewhere: fetched on the first click, blurred; each further click turns the
// blur on or off. No referrer is sent.
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.fetch");
  if (!button) return;
  const shown = button.querySelector("img");
  const ask = button.querySelector(".ask");
  if (shown) {
    const blurred = shown.classList.toggle("blurred");
    ask.textContent = blurred ? "Show clearly" : "Blur";
    return;
  }
  const picture = new Image();
  picture.referrerPolicy = "no-referrer";
  picture.className = "blurred";
  picture.alt = `row ${button.dataset.row}`;
  picture.addEventListener("load", () => { ask.textContent = "Show clearly"; });
  picture.addEventListener("error", () => { picture.remove(); ask.textContent = "Not reachable; try again"; });
  ask.textContent = "Fetching";
  picture.src = button.dataset.src;
  button.prepend(picture);
});
