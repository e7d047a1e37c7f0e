-- The limiter: decides about one key (a model of one provider account); each request atomically, all in one call.
--
-- `decisions.py` and the modules that it uses make the same decisions in Python.  Every change must be made in both; the
-- suites in tests/contract/test_limiter*.py check that both give the same answers.
--
-- KEYS   1 state of the key   2 state of the account   3 waiting calls (due)   4 places of the waiting calls
-- ARGV   1 milliseconds to add to the clock (tests)   2 the requests (JSON; wire.py builds them and reads the replies)
--
-- The states are read once and written once, as a whole (MessagePack), because each command costs more than a few
-- hundred bytes do.  Only the waiting calls are kept apart, because there may be thousands of them.
-- The fields of a state are described in buckets.py.  A call in flight is packed as an array (`pack_call`).
-- All times are in milliseconds of the server's clock.

local STATE, ACCOUNT, WAITING, PLACES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local call, max, min = redis.call, math.max, math.min

local BURST = 0.05            -- of the limit: the capacity of a bucket
local READY = 0.5             -- of the burst: a larger call starts at this level and leaves a negative level
local VALVE = 0.8             -- of the burst: above it no turn is required, so that quota is not lost
local FIRST, FULL = 0.95, 1.0 -- share of the limit that is refilled: at first, and once the headers agree
local RAISE = 0.01            -- of that share, per second
local DECREASE, FLOOR = 0.5, 0.05
local RECOVERY = 0.2          -- of the rate, for each second of capacity used
local EPOCH = 1000            -- at most one decrease in this period
local GRACE = 5000            -- a waiting call that has not returned this long after it was due is removed
local SEEN = 60000            -- workers that asked within this period count
local PATIENT = 10000         -- longer waits are shortened towards this value, because much may change meanwhile
local OLD = 10000             -- from this age on, the amount for the first call of a queue is kept free
local LONG = 3600000          -- a bucket of a longer period is not emptied, because it would take hours to refill
local IDLE = 600000           -- a bucket of one label (a channel) that was not used for so long is forgotten
local TIDY = 500              -- the maximum number of waiting calls that one call removes
local STATE_KEPT, QUEUE_KEPT = 172800000, 3600000
local CLOSE = 1000            -- calls admitted within this period may arrive in a different order
local STILL, WATCH = 250, 1500 -- a reset that moves by less than STILL within WATCH is the end of a window
local B_WINDOW, B_CALLS, B_SHARE, B_FIRST, B_LONGEST, B_PROBE = 10, 20, 0.5, 5000, 120000, 60000

local clock = call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000 + tonumber(ARGV[1])

local stored = call('MGET', STATE, ACCOUNT)
local account, account_changed, changed = stored[2] and cmsgpack.unpack(stored[2]) or {}, false, false
local state = stored[1] and cmsgpack.unpack(stored[1]) or {
  fill = FIRST, slowdown = 1, granted = 0, denied = 0, refused = 0, refusals = 0, virtual = 0, weights = 0,
  in_flight = 0, waiting = 0, dimensions = {}, calls = {}, workers = {}, finish = {}, teams = {}
}
local dimensions = state.dimensions

local function save()
  if changed then call('SET', STATE, cmsgpack.pack(state), 'PX', STATE_KEPT) end
  if account_changed then call('SET', ACCOUNT, cmsgpack.pack(account), 'PX', STATE_KEPT) end
end

local function pack_call(c)
  return cmsgpack.pack({c.ends, c.team, c.weight, c.at, c.number, c.share, c.lease, c.reserved, c.before})
end
local function unpack_call(packed)
  local c = cmsgpack.unpack(packed)
  return {
    ends = c[1], team = c[2], weight = c[3], at = c[4], number = c[5], share = c[6], lease = c[7], reserved = c[8],
    before = c[9]
  }
end

-- Buckets.

local function capacity(b) return max(BURST * b.limit, 1.5 * b.whole) end
local function rate(b) return b.limit * state.fill * state.slowdown / b.period end
local function level(b)
  local cap = capacity(b)
  if not b.level then
    -- After a cold start, or if Redis has lost its data: start with one second's worth, never with a full burst.
    return min(cap, max(b.limit * FIRST * 1000 / b.period, b.whole))
  end
  if b.level >= cap then return b.level end
  return min(cap, b.level + max(0, now - b.at) * rate(b))
end
local function put(b, value) b.level, b.at = value, now end
local function refresh() -- must precede every change of a rate
  for _, b in pairs(dimensions) do if b.limit then put(b, level(b)) end end
end
local function starts(b, cost) -- the level at which a call starts
  if b.whole > 0 then return cost end
  return min(cost, capacity(b) * READY)
end

-- The remaining quota that the provider itself has reported; nil if that is unknown or outdated.
local function told(b)
  if not b.left or now >= b.left_until then return nil end
  if b.window then return b.left end -- a window: nothing is refilled before its end
  return b.left + max(0, now - b.left_at) * b.limit / b.period
end

-- The queue.

local function leave(member)
  call('ZREM', WAITING, member)
  if call('HDEL', PLACES, member) == 0 then return end
  state.waiting = max(0, state.waiting - 1)
  local name = string.match(member, '^(.-)\n')
  local team = state.teams[name]
  if not team then return end
  if team.first and team.first.member == member then team.first = nil end
  team.gone = team.gone + 1
  if team.gone >= team.came then
    state.weights = max(0, state.weights - team.weight)
    state.teams[name] = nil
  end
end

local function due(time) state.tidy_at = min(state.tidy_at or time, time) end

local function tidy()
  if not state.tidy_at or now < state.tidy_at then return end
  state.tidy_at = nil
  for id, packed in pairs(state.calls) do
    local ends = unpack_call(packed).ends
    if ends <= now then -- after a crash its lease is freed; what it reserved stays spent
      state.calls[id], state.in_flight = nil, state.in_flight - 1
    else due(ends) end
  end
  for _, member in ipairs(call('ZRANGEBYSCORE', WAITING, '-inf', now - GRACE, 'LIMIT', 0, TIDY)) do leave(member) end
  local earliest = call('ZRANGE', WAITING, 0, 0, 'WITHSCORES')
  if earliest[2] then due(tonumber(earliest[2]) + GRACE)
  else state.waiting, state.weights, state.teams = 0, 0, {} end -- also if Redis has dropped the keys of the queue
  for name, b in pairs(dimensions) do
    if b.labelled and now - (b.at or now) >= IDLE then dimensions[name] = nil end
  end
end

-- Would this call take capacity that cannot be refilled in time for a call that has long been first in its queue?
local function robs(elder, cost)
  if not elder or now - elder.since < OLD then return false end
  local ahead = max(0, elder.due - now)
  for name, theirs in pairs(elder.cost) do
    local b, ours = dimensions[name], cost[name] or 0
    if b and b.limit and theirs > 0 and ours > 0 then
      if level(b) - ours + ahead * rate(b) < starts(b, theirs) then return true end
      local left = told(b)
      if left and b.window then
        if left >= theirs and left - ours < theirs then return true end
      elseif left and left - ours + ahead * b.limit / b.period < theirs then return true end
    end
  end
  return false
end

-- acquire

local function configure(asked)
  for _, d in ipairs(asked) do
    local b = dimensions[d.name]
    if not b or (d.labelled and now - (b.at or now) >= IDLE) then b = {}; dimensions[d.name] = b end
    b.period, b.whole, b.labelled, b.ceiling = d.period, d.whole, d.labelled or nil, d.ceiling
    local bound = b.learned or d.assumed
    if d.ceiling and (not bound or d.ceiling < bound) then bound = d.ceiling end
    if bound ~= b.limit then
      local before = b.limit and level(b)
      b.limit = bound
      if before and bound then put(b, min(before, capacity(b))) end
    end
    if bound and not b.level then put(b, level(b)) end -- a cold bucket fills from its first request on
  end
end

local function count_workers(worker)
  local count = 0
  if worker then state.workers[worker] = now end
  for name, seen in pairs(state.workers) do
    if seen <= now - SEEN then state.workers[name] = nil else count = count + 1 end
  end
  return count
end

-- Whose turn is it?  Start-time fair queueing by dominant share: the team with the smallest start tag is next.
local function position(r, member)
  local team, rival = state.teams[r.team], nil
  local q = {team = team, tag = team and team.tag or max(state.virtual, state.finish[r.team] or 0), turn = true}
  for name, other in pairs(state.teams) do
    if name ~= r.team and (not rival or other.tag < state.teams[rival].tag
        or (other.tag == state.teams[rival].tag and name < rival)) then rival = name end
  end
  if rival and q.tag > state.teams[rival].tag + 1e-9 then
    q.turn, q.rival = false, state.teams[rival].first
  end
  q.place = state.waiting > 0 and tonumber(call('HGET', PLACES, member) or nil) or nil
  local gone, first = team and team.gone or 0, team and team.first
  q.ahead = q.place and max(0, q.place - gone - 1) or (team and team.came or 0) - gone
  if first and not (q.place and q.place <= first.place) then
    q.elder, q.ahead = first, max(1, q.ahead)
  end
  local weights = state.weights + (team and 0 or r.weight)
  q.before = min(state.waiting - (q.place and 1 or 0), q.ahead * weights / r.weight)
  if not q.turn then q.before = max(q.before, 1) end
  return q
end

local function line_up(r, q, member, cost, wait)
  local team = state.teams[r.team]
  if not q.place then
    if not team then
      team = {tag = q.tag, came = 0, gone = 0, weight = r.weight}
      state.teams[r.team] = team
      state.weights = state.weights + r.weight
    end
    team.came = team.came + 1
    q.place = team.came
    state.waiting = state.waiting + 1
    call('HSET', PLACES, member, q.place)
  end
  local first = team and team.first
  if team and (not first or q.place <= first.place) then
    local since = first and q.place == first.place and first.since or now
    team.first = {member = member, place = q.place, since = since, due = now + wait, cost = cost}
  end
  call('ZADD', WAITING, now + wait, member)
  if not state.queue_until or state.queue_until - now < QUEUE_KEPT / 2 or state.waiting == 1 then
    call('PEXPIRE', WAITING, QUEUE_KEPT)
    call('PEXPIRE', PLACES, QUEUE_KEPT)
    state.queue_until = now + QUEUE_KEPT
  end
  due(now + wait + GRACE)
  state.denied = state.denied + 1
end

local function acquire(r)
  changed = true
  configure(r.dimensions)
  local workers = count_workers(r.worker)
  local function granted()
    local limits = {}
    for name, b in pairs(dimensions) do if not b.labelled then limits[name] = b.limit end end
    return {kind = 'grant', workers = workers, now = now, limits = limits}
  end
  if state.calls[r.id] then return granted() end
  local cost, share = {}, 0
  for _, d in ipairs(r.dimensions) do
    local b = dimensions[d.name]
    cost[d.name] = d.cost
    if b.limit then
      if d.cost > b.limit then return {kind = 'never', dimension = d.name, cost = d.cost, limit = b.limit} end
      if not b.labelled then share = max(share, d.cost * b.period / b.limit / 1000) end
    end
  end
  tidy()

  -- Blocked for all callers?
  local base, why = 0, nil
  local function later(time, reason) if time > base then base, why = time, reason end end
  later(max(state.closed or 0, account.closed or 0) - now, 'retry_after')
  local opens, probing = state.breaker_until or 0, false
  if opens > now then later(opens - now, 'breaker')
  elseif opens > 0 then
    if (state.probe_until or 0) > now then later(min(state.probe_until - now, 1000), 'breaker') else probing = true end
  end
  local member = r.team .. '\n' .. r.ticket
  local q = position(r, member)

  -- Is there enough capacity?
  local room, idle, turn = base == 0, true, q.turn
  for _, d in ipairs(r.dimensions) do
    local b = dimensions[d.name]
    local left = b.limit and d.cost > 0 and told(b)
    if left and left < d.cost then
      room = false
      if b.window then later(b.left_until - now, d.name) else later((d.cost - left) * b.period / b.limit, d.name) end
    end
  end
  local soonest = base
  for _, d in ipairs(r.dimensions) do
    local b = dimensions[d.name]
    if b.limit and d.cost > 0 then
      local has, cap, mean, need = level(b), capacity(b), b.mean or d.cost, starts(b, d.cost)
      -- The first call may need more than the others.  Its amount is kept free; otherwise it would be overtaken
      -- forever.
      local first = q.elder and q.elder.cost[d.name]
      local more = first and max(0, starts(b, first) - mean) or 0
      if has < need then room = false end
      -- The calls ahead may be for other labels, and take nothing of this bucket.
      if not b.labelled and has < max(need, cap * VALVE) then
        idle = false
        if has < need + q.ahead * mean + more then turn = false end
      end
      local missing = need + q.before * mean + more - min(cap, has + base * rate(b))
      if (has < need or not b.labelled) and base + missing / rate(b) > soonest then
        soonest = base + missing / rate(b)
        if has < need or not why then why = d.name end
      end
    end
  end
  local allowed = max(1, math.floor(r.seats * state.slowdown))
  if state.in_flight >= allowed then
    room, why = false, why or 'concurrency'
    soonest = max(soonest, base + (q.before + 1) * (state.latency or 1000) / allowed)
  elseif allowed - state.in_flight < 1 + max(1, VALVE * BURST * allowed) then
    idle = false
    if allowed - state.in_flight <= q.ahead then turn = false end
  end
  if robs(q.elder, cost) or robs(q.rival, cost) then idle, turn = false, false end

  if not room or not (turn or idle) then
    local soft = max(soonest - base, room and max(5, 1000 * (state.mean_share or 0)) or 0)
    if soft > PATIENT then soft = PATIENT + 0.6 * (soft - PATIENT) end
    local wait = max(5, base + soft)
    line_up(r, q, member, cost, wait)
    return {kind = 'wait', wait = wait, why = why or 'turn', due = now + wait}
  end

  local reserved, before = {}, {}
  for _, d in ipairs(r.dimensions) do
    local b = dimensions[d.name]
    if b.limit then
      local left = told(b)
      if left then b.left, b.left_at = left - d.cost, now end
      put(b, level(b) - d.cost)
      b.spent = (b.spent or 0) + d.cost
      b.mean = b.mean or d.cost
      reserved[d.name], before[d.name] = d.cost, b.spent
    end
  end
  state.mean_share = 0.9 * (state.mean_share or share) + 0.1 * share
  state.virtual = max(state.virtual, q.tag)
  state.finish[r.team] = q.tag + share / r.weight
  for name, tag in pairs(state.finish) do
    if tag < state.virtual then state.finish[name] = nil end -- expired tags have no effect
  end
  if q.team then q.team.tag = q.tag + share / r.weight end
  if q.place then leave(member) end
  local m = state.slowdown
  if m < 1 then state.slowdown = min(1, m + RECOVERY * max(share, 1 / r.seats) / m) end -- only while the rate is used
  if probing then state.probe_until, state.probe = now + B_PROBE, r.id end
  state.granted = state.granted + 1
  state.in_flight = state.in_flight + 1
  state.calls[r.id] = pack_call({
    ends = now + r.lease, team = r.team, weight = r.weight, at = now, number = state.granted, share = share,
    lease = r.lease, reserved = reserved, before = before
  })
  due(now + r.lease)
  return granted()
end

-- settle

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
