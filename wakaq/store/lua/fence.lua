-- Begins a rescue: evicts a supervisor that was seen to stand still.
-- KEYS[1]  hash, supervisor id -> 'number token gave'
-- ARGV[1]  supervisor id    ARGV[2]  what stood there when it was last looked at, '' for nothing
-- Returns 1, or 0 if it has moved.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
