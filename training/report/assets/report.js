"use strict";
// Draws the charts, moves the samples with the slider, and loads the page of a living run again.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const report = (window.report = { charts: [], data });
  const HEIGHT = 260;

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function axis(label, unit) {
    return {
      label,
      labelSize: 18,
      size: label ? 36 : 62,
      stroke: color("pale"),
      grid: { stroke: color("line"), width: 1 },
      ticks: { stroke: color("line"), width: 1 },
      values: (plot, numbers) => numbers.map((value) => (value === null ? "" : short(value) + unit)),
    };
  }

  function short(value) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  }

  function curve(series, index, isBars) {
    const stroke = color("curve-" + (index % 10));
    const options = {
      label: series.label,
      stroke,
      width: series.is_faint ? 1 : 2,
      alpha: series.is_faint ? 0.6 : 1,
      points: { show: series.has_points || undefined, size: 5 },
      spanGaps: true,
      value: (plot, value) => (value === null || value === undefined ? "-" : short(value)),
    };
    if (isBars) {
      options.fill = stroke;
      options.paths = uPlot.paths.bars({ size: [0.9, 100] });
      options.points = { show: false };
    }
    return options;
  }

  function markLines(marks) {
    return {
      hooks: {
        draw: (plot) => {
          const { ctx, bbox } = plot;
          ctx.save();
          ctx.strokeStyle = color("mark");
          ctx.fillStyle = color("pale");
          ctx.font = 11 * devicePixelRatio + "px sans-serif";
          ctx.textAlign = "left";
          ctx.textBaseline = "alphabetic";
          ctx.setLineDash([4, 4]);
          const width = 12 * devicePixelRatio;
          let lastLabel = -Infinity;
          for (const [step, text] of marks) {
            const x = plot.valToPos(step, "x", true);
            if (x < bbox.left || x > bbox.left + bbox.width) continue;
            // labels of steps that are close stand next to each other
            const label = Math.max(x + 4, lastLabel + width);
            lastLabel = label;
            ctx.beginPath();
            ctx.moveTo(x, bbox.top);
            ctx.lineTo(x, bbox.top + bbox.height);
            ctx.stroke();
            ctx.save();
            ctx.translate(label, bbox.top + 4);
            ctx.rotate(Math.PI / 2);
            ctx.fillText(text, 0, 0);
            ctx.restore();
          }
          ctx.restore();
        },
      },
    };
  }

  function isPositive(chart) {
    return chart.series.every((series) => series.values.every((value) => value === null || value > 0));
  }

  function draw(element) {
    const chart = data.charts[Number(element.dataset.chart)];
    const isLogarithmic = chart.is_logarithmic && isPositive(chart);
    element.textContent = "";
    const options = {
      width: element.clientWidth,
      height: HEIGHT,
      scales: { x: { time: false }, y: isLogarithmic ? { distr: 3 } : {} },
      axes: [axis(chart.x_label, ""), axis("", chart.unit ? " " + chart.unit : "")],
      series: [{ label: chart.x_label }].concat(
        chart.series.map((series, index) => curve(series, index, chart.are_bars))
      ),
      plugins: [markLines(chart.marks)],
    };
    if (chart.are_bars) options.scales.x.range = [0, 1];
    const columns = [chart.x].concat(chart.series.map((series) => series.values));
    const plot = new uPlot(options, columns, element);
    plot.root.querySelectorAll("canvas").forEach((canvas) => canvas.setAttribute("aria-hidden", "true"));
    report.charts.push({ id: chart.id, plot });
  }

  function drawAll() {
    report.charts.forEach((chart) => chart.plot.destroy());
    report.charts = [];
    document.querySelectorAll(".plot").forEach(draw);
  }

  function resizeAll() {
    document.querySelectorAll(".plot").forEach((element, index) => {
      report.charts[index].plot.setSize({ width: element.clientWidth, height: HEIGHT });
    });
  }

  // Of each run, shows the last samples up to a step.
  function showStep(step) {
    document.querySelectorAll(".now").forEach((element) => {
      const holder = element.closest("[data-prompt]");
      const run = data.samples[Number(holder.dataset.run)];
      const prompt = run.prompts[Number(holder.dataset.prompt)];
      let index = 0;
      run.steps.forEach((other, position) => {
        if (other <= step) index = position;
      });
      const image = element.querySelector("img");
      const caption = element.querySelector("figcaption");
      const link = element.querySelector("a");
      const picture = prompt.pictures[index];
      image.hidden = !picture;
      element.querySelector(".missing").hidden = Boolean(picture);
      if (picture) image.src = picture;
      if (picture && prompt.links[index]) link.setAttribute("href", prompt.links[index]);
      else link.removeAttribute("href");
      const name = data.samples.length > 1 ? run.label + ", " : "";
      caption.textContent = name + "step " + run.steps[index];
    });
  }

  function connectSlider() {
    const slider = document.getElementById("step");
    if (!slider) return;
    const steps = slider.dataset.steps.split(",").map(Number);
    const saved = remembered("step");
    const position = saved === null ? -1 : steps.indexOf(Number(saved));
    if (position >= 0) slider.value = String(position);
    function move() {
      const step = steps[Number(slider.value)];
      const isLast = Number(slider.value) === steps.length - 1;
      document.getElementById("step-name").textContent = String(step);
      slider.setAttribute("aria-valuetext", "step " + step);
      remember("step", isLast ? null : String(step)); // the last step stays the last one
      showStep(step);
    }
    slider.addEventListener("input", move);
    move();
  }

  // The browser may forbid storage, for example in a file that was opened from an e-mail.
  function remembered(name) {
    try {
      return sessionStorage.getItem(location.pathname + name);
    } catch (error) {
      return null;
    }
  }

  function remember(name, value) {
    try {
      if (value === null) sessionStorage.removeItem(location.pathname + name);
      else sessionStorage.setItem(location.pathname + name, value);
    } catch (error) {
      return;
    }
  }

  function reload() {
    remember("scroll", String(window.scrollY));
    const open = [];
    document.querySelectorAll("details").forEach((element, index) => {
      if (element.open) open.push(index);
    });
    remember("open", open.join(","));
    location.reload();
  }

  function connectRefresh() {
    const checkbox = document.getElementById("refresh");
    if (!checkbox) return;
    if (remembered("refresh") === "off") checkbox.checked = false;
    checkbox.addEventListener("change", () => remember("refresh", checkbox.checked ? null : "off"));
    document.getElementById("reload").addEventListener("click", reload);
    const seconds = Number(document.body.dataset.refreshEvery);
    setInterval(() => {
      if (checkbox.checked && !document.hidden) reload();
    }, 1000 * seconds);
  }

  function showAge() {
    const seconds = Date.now() / 1000 - Number(document.body.dataset.writtenAt);
    const isLive = Number(document.body.dataset.refreshEvery) > 0;
    if (!isLive || seconds < 60) return;
    const age = duration(seconds);
    document.getElementById("age").textContent = ", " + age + " ago";
    const badge = document.querySelector("h1 .badge");
    if (seconds >= 600 && badge) {
      badge.textContent = "no news for " + age + ": the run may be dead";
      badge.className = "badge dead";
    }
  }

  function duration(seconds) {
    if (seconds < 6000) return Math.round(seconds / 60) + " min";
    if (seconds < 172800) return Math.round(seconds / 3600) + " h";
    return Math.round(seconds / 86400) + " days";
  }

  const open = (remembered("open") || "").split(",").filter(Boolean).map(Number);
  document.querySelectorAll("details").forEach((element, index) => {
    if (open.includes(index)) element.open = true;
  });
  drawAll();
  connectSlider();
  connectRefresh();
  showAge();
  setInterval(showAge, 30000);
  const scroll = remembered("scroll");
  if (scroll !== null) {
    remember("scroll", null);
    window.scrollTo(0, Number(scroll));
  }
  let timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(resizeAll, 100);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
