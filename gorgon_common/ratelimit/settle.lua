-- Continues acquire.lua: settles a call and learns from its reply; the other requests; runs the requests.

local function count(failed) -- the breaker: calls and failures of the last ten seconds, by second
  local second, calls, failures, kept = math.floor(now / 1000), 0, 0, {}
  for _, entry in ipairs(state.outcomes or {}) do
    if entry[1] > second - B_WINDOW then kept[#kept + 1] = entry end
  end
  local last = kept[#kept]
  if not last or last[1] ~= second then last = {second, 0, 0}; kept[#kept + 1] = last end
  last[2], last[3] = last[2] + 1, last[3] + (failed and 1 or 0)
  state.outcomes = kept
  for _, entry in ipairs(kept) do calls, failures = calls + entry[2], failures + entry[3] end
  return calls >= B_CALLS and failures >= calls * B_SHARE
end

local function judge(id, outcome)
  local good = outcome == 'ok'
  local bad = outcome == 'failed' or outcome == 'overloaded'
  if state.probe == id then
    state.probe, state.probe_until = nil, nil
    if good then state.breaker_until, state.probes, state.outcomes = nil, nil, nil
    elseif bad then
      state.breaker_until = now + min(B_LONGEST, B_FIRST * 2 ^ state.probes)
      state.probes = state.probes + 1
    end
  elseif (good or bad) and not state.breaker_until and count(bad) and bad then
    state.breaker_until, state.probes, state.outcomes = now + B_FIRST, 1, nil
  end
end

local function slow(outcome, after, named, reserved)
  refresh()
  if now - (state.slowed_at or 0) >= EPOCH then
    state.slowdown, state.slowed_at, state.fill = max(FLOOR, state.slowdown * DECREASE), now, FIRST
  end
  state.refusals = state.refusals + 1
  if outcome == 'rate_limited' then
    state.refused = state.refused + 1
    for name, b in pairs(dimensions) do
      if b.limit and b.period <= LONG and (not b.labelled or reserved[name]) then put(b, min(0, level(b))) end
    end
    after = after or min(30000, 500 * 2 ^ min(state.refusals, 10))
  end
  if after then
    -- If headers name the model's own limits, only the model is blocked.  Otherwise the exceeded limit is unknown, and
    -- the whole account is blocked.
    if named then state.closed = max(state.closed or 0, now + after)
    else account.closed, account_changed = max(account.closed or 0, now + after), true end
  end
end

-- Return when the provider's window resets, nil if that has passed; tells windows from buckets.
local function reset(b, ends)
  if ends <= now then return nil end
  local known, first = b.resets, b.reset_first or 0
  if known and now < known and math.abs(ends - first) <= STILL then
    b.resets = max(ends, known)
    if now - b.reset_since >= WATCH then b.window = true end -- it does not move: a window, not a bucket
  else
    if known and now < known - 2 * STILL and ends > first + STILL then b.window = nil end -- it moves: a bucket
    b.resets, b.reset_first, b.reset_since = ends, ends, now
  end
  return b.resets
end

-- Apply one header; returns whether it confirms that capacity is left, nil without information.
local function learn(name, b, signal, c)
  if signal.limit and signal.limit ~= b.learned then
    refresh()
    b.learned = signal.limit
    local has = b.limit and level(b)
    b.limit = b.ceiling and min(signal.limit, b.ceiling) or signal.limit
    if has then put(b, min(has, capacity(b))) end
  end
  if not signal.remaining or not b.limit then return nil end
  local ends
  if signal.resets then
    ends = reset(b, (signal.absolute and now or c.at) + signal.resets)
    if not ends then return nil end
  end
  if c.number < (b.left_by or 0) then return nil end -- a later call has already reported
  local rest = signal.remaining - ((b.spent or 0) - (c.before[name] or 0))
  local window = b.window and ends
  if window then
    -- Calls that started just before this one may have arrived after it.
    for _, packed in pairs(state.calls) do
      local at = unpack_call(packed).at
      if at >= c.at - CLOSE and at < c.at then rest = rest - (b.mean or 0) end
    end
  else
    rest = rest + max(0, now - c.at) * b.limit / b.period
  end
  b.left, b.left_at, b.left_by = rest, now, c.number
  b.left_until = window and ends + 5 or now + 60000
  return rest >= (b.mean or 0)
end

local function settle(r)
  local packed = state.calls[r.id]
  if not packed then return 0 end -- already settled, or forgotten
  changed = true
  state.calls[r.id], state.in_flight = nil, state.in_flight - 1
  local c = unpack_call(packed)
  state.latency = 0.9 * (state.latency or now - c.at) + 0.1 * (now - c.at)
  local real = 0
  for name, reserved in pairs(c.reserved) do
    local b = dimensions[name]
    if b and b.limit then
      local actual = r.used[name] or reserved
      if not b.labelled then real = max(real, actual * b.period / b.limit / 1000) end
      b.mean = 0.9 * (b.mean or actual) + 0.1 * actual
      local back = reserved - actual
      if back ~= 0 then
        local has = level(b)
        -- A refund may exceed the burst, by up to two calls, because this capacity was never used.
        if back > 0 then put(b, max(has, min(max(capacity(b), 2 * reserved), has + back))) else put(b, has + back) end
        if b.left and c.number > (b.left_by or 0) then b.left = b.left + back end
      end
    end
  end
  local finish, team = state.finish[c.team], state.teams[c.team]
  if finish then
    state.finish[c.team] = finish + (real - c.share) / c.weight
    if team then team.tag = team.tag + (real - c.share) / c.weight end
  end
  local agree, named = nil, false
  for name, signal in pairs(r.signals) do
    named = true
    local said = nil
    if dimensions[name] then said = learn(name, dimensions[name], signal, c) end
    if said ~= nil then agree = (agree == nil or agree) and said end
  end
  if r.outcome == 'rate_limited' or r.outcome == 'overloaded' then
    slow(r.outcome, r.after, named, c.reserved)
  elseif r.outcome == 'ok' then
    state.refusals = 0
    if agree and state.fill < FULL then
      refresh()
      state.fill = min(FULL, state.fill + RAISE * min(1000, max(0, now - (state.agreed_at or now))) / 1000)
    end
    if agree then state.agreed_at = now end
  end
  judge(r.id, r.outcome)
  return 1
end

-- the rest

local function extend(r)
  local held = 0
  for _, id in ipairs(r.ids) do
    if state.calls[id] then
      local c = unpack_call(state.calls[id])
      c.ends = now + r.lease
      state.calls[id] = pack_call(c)
      held, changed = held + 1, true
    end
  end
  return held
end

local function debit(r) -- what a worker used on its own; all workers together deduct at most the capacity of a bucket
  refresh()
  changed = true
  local share = max(1, count_workers())
  for name, amount in pairs(r.used) do
    local b = dimensions[name]
    if b and b.limit then put(b, level(b) - min(amount, b.period > LONG and amount or capacity(b) / share)) end
  end
  return 1
end

local function snapshot()
  changed = stored[1] and true
  state.tidy_at = 0
  tidy()
  local levels, teams = {}, {}
  for name, b in pairs(dimensions) do
    if b.limit then
      levels[name] = {
        limit = b.limit, level = level(b), told = told(b), learned = b.learned ~= nil, set = b.ceiling == b.limit,
        period = b.period
      }
    end
  end
  for name, team in pairs(state.teams) do teams[name] = team.came - team.gone end
  local opens = state.breaker_until or 0
  return {
    levels = levels, teams = teams, in_flight = state.in_flight, waiting = state.waiting, workers = count_workers(),
    rate = state.fill * state.slowdown, closed = max(0, max(state.closed or 0, account.closed or 0) - now),
    breaker = max(0, opens - now), half_open = opens > 0 and opens <= now,
    granted = state.granted, denied = state.denied, refused = state.refused
  }
end

local operations = {acquire = acquire, settle = settle, extend = extend, debit = debit, snapshot = snapshot}
local replies = {}
for k, request in ipairs(cjson.decode(ARGV[2])) do replies[k] = operations[request.operation](request) end
save()
return cjson.encode(replies)
